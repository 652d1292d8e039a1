"""What bad input gets, at the door: a clear error, an exit code that is not 0, and a tree as good as before."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.plan import plan_models
from cluster.cli import main
from cluster.config import BaseLMConfig, CorpusConfig, GistNetConfig, StoreConfig
from ray_job import JOBS
from storage.corpus import open_corpus, read_corpus
from storage.store import Store
from storage.tree.reader import ContextReader
from storage.tree.verify import verify_context
from tests.actors.helpers import assert_same_tree, follow, ingest, make_compactor, make_text

pytestmark = pytest.mark.usefixtures("ray_cluster")

Door = Callable[..., tuple[int, str]]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index, words in enumerate((500, 20, 900)):
        (folder / f"doc{index}.txt").write_text(make_text(index, words))
    return folder


@pytest.fixture
def door(tmp_path: Path, corpus: Path, tiny_lm_config: BaseLMConfig, capsys: pytest.CaptureFixture[str]) -> Door:
    """Run `ray_job.py <words>` with small defaults; returns the exit code and what went to stderr."""

    def run(*words: str, root: Path = tmp_path / "store", tracked: bool = True) -> tuple[int, str]:
        arguments = ["--store.root", str(root), "--store.context", "c", "--store.segment_super_blocks", "2"]
        if words[0] in {"compact", "demo"}:
            arguments += ["--corpus.paths", f"[{corpus}]", "--gistnet.lm_layers", "1", "--compaction.feed", "actors"]
            arguments += ["--compaction.threads_per_compactor", "1", "--compaction.windows_per_batch", "1"]
            arguments += ["--run.dir", str(tmp_path / "runs"), "--tracking.enabled", str(tracked).lower()]
        if words[0] != "tree":
            arguments += ["--base_lm.source", "tiny", "--base_lm.cache_dir", str(tiny_lm_config.cache_dir)]
        if words[0] == "compact":
            arguments += ["--base_lm.dtype", "float32"]
        num_command_words = 2 if words[0] == "tree" else 1
        capsys.readouterr()
        code = main(JOBS, [*words[:num_command_words], *arguments, *words[num_command_words:]])
        return code, capsys.readouterr().err

    return run


def fingerprint(folder: Path) -> dict[str, str]:
    """Digest of every file of a context but SQLite's own scratch files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(("-shm", "-wal"))
    }


@pytest.fixture
def context(corpus: Path, tmp_path: Path, tiny_lm_config: BaseLMConfig) -> Path:
    """The folder of a context as `compact` makes it, made without a cluster."""
    root = tmp_path / "store"
    store = StoreConfig(root=root, context="c", segment_super_blocks=2)
    plan = plan_models(tiny_lm_config, GistNetConfig(lm_layers=1), store)
    with Store(root, create=True).open_writer(
        "c", plan.identity, plan.encoding, create=True, segment_super_blocks=2
    ) as writer:
        ingest(writer, plan, make_compactor(plan), list(read_corpus(open_corpus(CorpusConfig(paths=[str(corpus)])))))
        follow(writer, plan)
        return writer.folder


def test_the_context_of_these_tests_is_one_that_compact_goes_on_with(door: Door, context: Path, corpus: Path) -> None:
    (corpus / "later.txt").write_text(make_text(7, 30))
    code, error = door("compact")
    assert code == 0, error
    with ContextReader(context, "c") as reader:
        assert [d.meta.uri for d in reader.documents()][-1] == "corpus/later.txt"
        assert len(reader.documents()) == 4


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["compact", "--store.rooot", "x"], 2, ["unknown key 'store.rooot'", "store.root", "gist_dtype"]),
        (["compact", "--compaction.max_in_flight", "0"], 2, ["compaction.max_in_flight", "at least 1"]),
        (["compact", "--store.gist_dtype", "float8"], 2, ["store.gist_dtype", "bfloat16"]),
        (["compact", "--corpus.paths", "[nowhere/at/all]"], 3, ["nowhere/at/all"]),
        (["compact", "--base_lm.source", "no/such/folder/at/all"], 4, ["base_lm.source"]),
        (["compact", "--gistnet.path", "no/such/net"], 4, ["no/such/net"]),
        (["compact", "--gistnet.kind", "mean"], 5, ["windowed-m1-l1", "mean-m1", "rebuild-gists"]),
        (["compact", "--gistnet.lm_layers", "2"], 5, ["windowed-m1-l2"]),
        (["compact", "--gistnet.key_layer", "0"], 2, ["gistnet.key_layer", "at least 1"]),
        (["compact", "--store.gist_dtype", "int8"], 5, ["int8", "float16"]),
        (["compact", "--ray.num_cpus", "-1"], 2, ["ray.num_cpus"]),
        (["inspect", "--store.context", "other"], 5, ["'other'", "it has: c"]),
        (["inspect", "--node", "7:0"], 2, ["7:0"]),
        (["tree", "verify", "--store.context", "other"], 5, ["'other'"]),
    ],
)
def test_refused_with_what_to_do(door: Door, context: Path, words: list[str], code: int, says: list[str]) -> None:
    before = fingerprint(context)
    found, error = door(*words)
    assert found == code, error
    message = error[error.index("error: ") :]
    assert all(text in message for text in says), message
    assert "Traceback" not in message
    assert fingerprint(context) == before


def test_an_unreadable_corpus(door: Door, context: Path, tmp_path: Path) -> None:
    before = fingerprint(context)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 this is no table PAR1")
    code, error = door("compact", "--corpus.paths", f"[{broken}]")
    assert (code, "broken.parquet" in error) == (3, True)
    assert fingerprint(context) == before


def test_another_base_model(door: Door, context: Path, tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    original = next((tiny_lm_config.cache_dir / "models").glob("tiny-*"))
    other = tmp_path / "other-model"
    shutil.copytree(original, other, ignore=shutil.ignore_patterns(".*"))
    config = other / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": ', '"rms_norm_eps": 1'))
    before = fingerprint(context)
    code, error = door("compact", "--base_lm.source", str(other))
    assert code == 5, error
    assert "base_model_digest" in error
    assert "--store.context" in error
    assert fingerprint(context) == before


def test_a_corrupt_catalogue(door: Door, context: Path) -> None:
    catalogue = context / "catalogue.sqlite"
    data = bytearray(catalogue.read_bytes())
    data[: len(data) // 2] = os.urandom(len(data) // 2)
    catalogue.write_bytes(data)
    before = fingerprint(context)
    for words in (["compact"], ["inspect"], ["tree", "verify"]):
        code, error = door(*words)
        assert code == 5, error
        assert "catalogue.sqlite" in error
        assert "backup" in error
    assert fingerprint(context) == before


def test_a_truncated_segment(door: Door, context: Path) -> None:
    shard = min(context.glob("segments/*/lod1/gists/c.0.0"))
    os.truncate(shard, shard.stat().st_size - 100)
    before = fingerprint(context)
    code, error = door("tree", "verify")
    assert code == 5, error
    code, error = door("inspect", "--node", "1:0")
    assert code == 5, error
    assert "lod1/gists" in error
    assert "backup" in error
    assert fingerprint(context) == before


def test_a_second_writer(door: Door, context: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    identity, encoding = store.identity("c")
    with store.open_writer("c", identity, encoding, owner="the night shift"):
        before = fingerprint(context)
        code, error = door("compact")
        assert code == 5, error
        assert "the night shift" in error
        assert "--store.context" in error
        assert fingerprint(context) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk(
    door: Door, small_disk: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(3, 14):
        (corpus / f"doc{index:02}.txt").write_text(make_text(index, 1500))
    code, error = door("compact", root=small_disk / "store")
    assert code == 5, error
    assert "store.root" in error, "the estimate refuses it before anything starts"
    assert not (small_disk / "store").exists()

    usage = shutil.disk_usage("/")
    monkeypatch.setattr("storage.store.shutil.disk_usage", lambda _: usage)
    code, error = door("compact", root=small_disk / "store")
    assert code == 5, error
    assert "Free space and run the same command again" in error
    report = verify_context(small_disk / "store" / "c", "c")
    assert report.problems == []

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    code, error = door("compact", root=small_disk / "store")
    assert code == 0, error
    code, error = door("compact", root=tmp_path / "roomy")
    assert code == 0, error
    with (
        Store(small_disk / "store").open_reader("c") as resumed,
        Store(tmp_path / "roomy").open_reader("c") as undisturbed,
    ):
        assert report.num_blocks < resumed.version.num_blocks
        assert_same_tree(resumed, undisturbed)
