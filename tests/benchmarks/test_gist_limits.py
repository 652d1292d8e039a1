from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gist_limits
from cluster.config import BaseLMConfig
from models.base_lm import BaseLM
from tests.actors.helpers import ingest, make_compactor, make_documents, open_context, tiny_plan


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Path:
    """A context of three documents of over 576 tokens and one of fewer, and a net."""
    root = tmp_path_factory.mktemp("store")
    plan = tiny_plan(tiny_lm_config, root)
    with open_context(root, plan) as writer:
        ingest(writer, plan, make_compactor(plan), make_documents([200, 20, 300, 150]))
    plan.gistnet.save(root / "gistnet")
    return root


def words(root: Path, lm: BaseLMConfig, *others: str) -> list[str]:
    given = ["--store", str(root), "--contexts", "c", "--lm", "tiny", "--cache_dir", str(lm.cache_dir)]
    return [*given, "--gistnet", str(root / "gistnet"), "--dtype", "float32", "--steps", "4", "--rate", "0.05", *others]


def test_gists_stand_beside_what_they_could_be(
    root: Path, tiny_lm_config: BaseLMConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gist_limits.main(words(root, tiny_lm_config, "--num_places", "3")) == 0
    said = capsys.readouterr()
    assert "8 vectors for 256 tokens: 3 places" in said.out
    for row in ("the newest 8 tokens", "the 32 rarest that come again", "hold their block, 4 steps"):
        assert row in said.out
    assert "measured 3 of 3 places" in said.err


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        (["--num_places", "4"], "has 3 documents of 576 tokens and more; 4 places need as many"),
        (["--num_places", "1"], "must be at least 2"),
    ],
)
def test_too_little_is_refused(
    root: Path, tiny_lm_config: BaseLMConfig, others: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gist_limits.main(words(root, tiny_lm_config, *others)) == 2
    assert reason in capsys.readouterr().err


def test_the_whole_history_is_what_the_model_reads_in_one_go(tiny_lm_config: BaseLMConfig) -> None:
    lm = BaseLM.load(tiny_lm_config)
    ids = torch.randint(lm.vocab_size, (2, 576), generator=torch.Generator().manual_seed(0))
    everything = torch.arange(gist_limits.HISTORY).expand(2, -1)
    with torch.no_grad():
        found = gist_limits.Reader(lm).raw(ids, everything)
        read = ids[:, gist_limits.BEFORE :]
        expected = lm.nll(lm.embed(read[:, :-1]), read[:, 1:])[:, gist_limits.HISTORY :]
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


def test_vectors_move_down_their_own_loss(tiny_lm_config: BaseLMConfig) -> None:
    lm = BaseLM.load(tiny_lm_config)
    reader = gist_limits.Reader(lm)
    blocks = torch.randint(lm.vocab_size, (2, 8, 32), generator=torch.Generator().manual_seed(0))
    start = lm.embed(blocks[:, :, -1]).float()
    held = gist_limits.moved(start, lambda vectors: reader.again(vectors, blocks).sum(), steps=8, rate=0.05)
    with torch.no_grad():
        assert (reader.again(held, blocks) < reader.again(start, blocks)).all()
