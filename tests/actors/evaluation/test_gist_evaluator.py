"""What stands in for a history, and what is said about it: against the tree, stock NLL, and plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.evaluation.gist_evaluator import (
    FULL,
    NONE,
    RECENCY,
    Condition,
    GistEvaluator,
    Measured,
    num_nodes,
    strangers,
)
from actors.evaluation.gist_results import GistResults, GistSampleFile, Setting
from actors.evaluation.gist_sources import TREE, EncodedGists, GistSource, TreeGists
from actors.evaluation.places import Place, choose_places
from actors.plan import CompactionPlan
from cluster.config import BaseLMConfig
from cluster.errors import ConfigError
from cluster.gist_evaluation_config import GistEvaluationConfig
from models.base_lm import BaseLM
from models.gistnet import GistNet, GistNetSpec
from models.positions import Positions
from storage.corpus import Document
from storage.store import Store
from tests.actors.helpers import follow, ingest, make_compactor, make_text, open_context, tiny_plan

HORIZON = 32
CONFIG = GistEvaluationConfig(
    num_places=4, history_tokens=1024, horizon_tokens=HORIZON, lods=[1, 2], tail_tokens=[0, 64], max_per_document=1
)


def texts_tree(root: Path, lm: BaseLMConfig, texts: Sequence[str]) -> CompactionPlan:
    plan = tiny_plan(lm, root)
    documents = [Document.from_raw(f"doc{i}.txt", text, text.encode()) for i, text in enumerate(texts)]
    with open_context(root, plan) as writer:
        ingest(writer, plan, make_compactor(plan), documents)
        follow(writer, plan)
    return plan


def control(kind: str, num_vectors: int = 1) -> GistNet:
    return GistNet.kinds[kind](GistNetSpec(kind, dim=64, num_vectors=num_vectors)).eval()


class Bench:
    """A tree of three documents, its places, and any sources beside its own gists."""

    def __init__(self, root: Path, plan: CompactionPlan, lm: BaseLM) -> None:
        self.plan, self.lm = plan, lm
        self.reader = Store(root).open_reader("c")

    def places(self, config: GistEvaluationConfig) -> list[Place]:
        align = 32 if 2 in config.lods else 1
        return choose_places(
            self.reader,
            config.num_places,
            config.history_tokens,
            config.horizon_tokens,
            within_document=True,
            max_per_document=config.max_per_document,
            align_blocks=align,
            seed=config.seed,
        )

    def net(self, name: str, gistnet: GistNet) -> EncodedGists:
        return EncodedGists(name, gistnet, self.lm, self.reader)

    def measure(self, config: GistEvaluationConfig, nets: Sequence[GistSource] = ()) -> GistResults:
        places = self.places(config)
        evaluator = GistEvaluator(config, self.lm, self.reader, [TreeGists(self.reader), *nets], strangers(places))
        return GistResults.of((place, evaluator.evaluate(place)) for place in places)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig, lm: BaseLM) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("gists")
    plan = texts_tree(root, tiny_lm_config, [make_text(i, n) for i, n in enumerate((700, 550, 620))])
    made = Bench(root, plan, lm)
    yield made
    made.reader.close()


@pytest.fixture(scope="module")
def results(bench: Bench) -> GistResults:
    nets = [
        bench.net("same", bench.plan.gistnet),
        bench.net("constant", control("constant")),
        bench.net("last_token", control("last_token", 2)),
    ]
    return bench.measure(CONFIG, nets)


def test_full_equals_the_stock_model(bench: Bench, results: GistResults) -> None:
    for place, measured in results.samples:
        tokens, _ = bench.reader.tokens(place.first_block, place.stop_block - place.first_block + 1)
        ids = torch.from_numpy(tokens.reshape(-1).astype(np.int64))[None]
        with torch.inference_mode():
            logits = bench.lm.logits(bench.lm.embed(ids))[0].double()
        stock = -torch.log_softmax(logits, -1)[torch.arange(1024, 1024 + HORIZON - 1), ids[0, 1025:]]
        assert measured[0].name == FULL
        np.testing.assert_allclose(measured[0].nll, stock, atol=1e-5)


def test_histories_lie_in_one_document_and_begin_at_a_super_block(bench: Bench) -> None:
    places = bench.places(CONFIG)
    assert len({place.uri for place in places}) == len(places) >= 2
    for place in places:
        document = bench.reader.document_at(place.first_block)
        assert place.first_block % 32 == 0
        assert place.stop_block + 1 < document.first_block + document.num_blocks
        assert document.meta.uri == place.uri


def test_slots_are_what_the_gists_cost(results: GistResults) -> None:
    slots = {(c.name, c.lod, c.tail_tokens): results.slots(c) for c in results.conditions}
    assert slots[FULL, 0, 0] == 1024
    assert slots[NONE, 0, 64] == 64
    assert slots["tree/own", 1, 0] == slots["tree/shuffled", 1, 0] == slots[RECENCY, 1, 0] == 32
    assert slots["tree/mean_gist", 1, 64] == slots[RECENCY, 1, 64] == 30 + 64
    assert slots["last_token/own", 1, 64] == slots["recency/m2", 1, 64] == 60 + 64
    assert slots["tree/own", 2, 0] == slots[RECENCY, 2, 0] == 1
    # Beside a tail no whole super-block of 1,024 slots is left.
    assert Setting(2, 64) not in results.settings
    assert num_nodes(64, 2) == 2
    assert num_nodes(62, 2) == 1 + 30


def test_a_net_measures_as_the_tree_it_made(results: GistResults) -> None:
    for setting in results.settings:
        for kind in ("own", "shuffled"):
            tree, same = (results.tokens_nll(Condition(f"{name}/{kind}", setting.lod, setting.tail_tokens))
                          for name in (TREE, "same"))  # fmt: skip
            np.testing.assert_array_equal(tree, same)


def test_equal_contents_give_equal_nll(results: GistResults) -> None:
    for setting in results.settings:
        own, shuffled, mean = (
            results.tokens_nll(Condition(f"constant/{kind}", setting.lod, setting.tail_tokens))
            for kind in ("own", "shuffled", "mean_gist")
        )
        np.testing.assert_array_equal(own, shuffled)
        np.testing.assert_array_equal(own, mean)
        assert results.content_nats("constant", setting).mean == 0
    assert results.content_nats(TREE, Setting(1, 0)).mean != 0


def test_shuffled_gists_are_another_documents_at_the_same_positions(bench: Bench, results: GistResults) -> None:
    places = [place for place, _ in results.samples]
    others = strangers(places)
    place, measured = results.samples[0]
    stranger = others[place.number]
    assert stranger.uri != place.uri
    gists = bench.reader.read("gists", 1, range(stranger.first_block, stranger.stop_block)).flatten(0, 1)
    tokens, _ = bench.reader.tokens(place.stop_block, 1)
    ids = torch.from_numpy(tokens.reshape(-1).astype(np.int64))[None]
    embeds = torch.cat([gists.to(bench.lm.dtype)[None], bench.lm.embed(ids[:, :-1])], dim=1)
    # In half tokens: a gist stands at the centre of its block, between two tokens.
    half_tokens = torch.cat([64 * torch.arange(32) + 31, 2 * (1024 + torch.arange(HORIZON - 1))])[None]
    with torch.inference_mode():
        logits = bench.lm.logits(embeds, positions=Positions(half_tokens))[0, 32:].double()
    expected = -torch.log_softmax(logits, -1)[torch.arange(HORIZON - 1), ids[0, 1:]]
    (found,) = [m.nll for m in measured if m.condition == Condition("tree/shuffled", 1, 0)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_own_equals_shuffled_where_all_documents_are_one_text(
    tmp_path: Path, tiny_lm_config: BaseLMConfig, lm: BaseLM
) -> None:
    text = make_text(0, 60)[:400]
    bench = Bench(tmp_path, texts_tree(tmp_path, tiny_lm_config, [text, text + " ", text + "  "]), lm)
    config = replace(CONFIG, lods=[1], history_tokens=320, tail_tokens=[0, 32])
    results = bench.measure(config, [bench.net("block", control("last_token"))])
    for source in (TREE, "block"):
        for setting in results.settings:
            content = results.content_nats(source, setting)
            assert (content.mean, content.standard_error) == (0, 0)
            own = results.nll(Condition(f"{source}/own", setting.lod, setting.tail_tokens))
            assert np.ptp(own) == 0, "identical contents, identical NLL"
    bench.reader.close()


def test_mixed_levels_beside_a_tail(bench: Bench) -> None:
    # 2,048 slots with a tail of 64: one LOD2 gist, 30 of LOD1, 64 tokens.
    config = replace(CONFIG, history_tokens=2048, tail_tokens=[64])
    results = bench.measure(config)
    assert results.slots(Condition("tree/own", 2, 64)) == 1 + 30 + 64
    place, _ = results.samples[0]
    evaluator = GistEvaluator(config, bench.lm, bench.reader, [TreeGists(bench.reader)], {})
    rows = evaluator._stand_ins(TreeGists(bench.reader), place, 2, 62)
    expected = torch.cat(
        [
            bench.reader.read("gists", 2, [place.first_block // 32])[0],
            bench.reader.read("gists", 1, range(place.first_block + 32, place.first_block + 62)).flatten(0, 1),
        ]
    )
    torch.testing.assert_close(rows.embeds, expected.to(bench.lm.dtype))
    assert rows.half_tokens[:3].tolist() == [1023, 2 * 1024 + 31, 2 * 1024 + 95]


def test_a_first_token_costs_everybody_a_slot(bench: Bench, results: GistResults) -> None:
    shown = bench.measure(replace(CONFIG, first_token=True, tail_tokens=[64]))
    for (place, plain), (_, measured) in zip(results.samples, shown.samples, strict=True):
        before = {m.condition: m for m in plain if m.tail_tokens == 64 or m.name == FULL}
        for m in measured:
            if m.condition not in before:
                continue
            assert m.slots == before[m.condition].slots + (m.name != FULL), place
            same = np.allclose(m.nll, before[m.condition].nll, atol=1e-5)
            assert same == (m.name == FULL)
    own = Condition(f"{TREE}/own", 1, 64)
    place, measured = shown.samples[0]
    (found,) = [m for m in measured if m.condition == own]
    tokens, _ = bench.reader.tokens(place.first_block, place.stop_block - place.first_block + 1)
    ids = torch.from_numpy(tokens.reshape(-1).astype(np.int64))
    gists = bench.reader.read("gists", 1, np.arange(place.first_block, place.stop_block - 2))[:, 0]
    rows = torch.cat([bench.lm.embed(ids[None, :1])[0], gists, bench.lm.embed(ids[None, 960 : 1023 + HORIZON])[0]])
    halves = [0, *(64 * block + 31 for block in range(30)), *(2 * t for t in range(960, 1023 + HORIZON))]
    with torch.inference_mode():
        logits = bench.lm.logits(rows[None], positions=Positions(torch.tensor([halves])))[0].double()
    stock = -torch.log_softmax(logits, -1)[torch.arange(95, 95 + HORIZON - 1), ids[1025 : 1024 + HORIZON]]
    np.testing.assert_allclose(found.nll, stock.numpy(), atol=1e-4)


def test_spread_is_the_share_that_is_not_the_mean(bench: Bench, results: GistResults) -> None:
    source = TreeGists(bench.reader)
    everything = bench.reader.read("gists", 1, range(bench.reader.version.num_blocks)).double()[:, 0]
    torch.testing.assert_close(source.constant(1)[0].double(), everything.mean(0), atol=1e-5, rtol=1e-4)
    spreads = []
    for place, _ in results.samples:
        own = everything[place.first_block : place.stop_block]
        spreads.append(float((own - everything.mean(0)).square().mean() / own.square().mean()))
    spread = results.spread(TREE, 1)
    assert spread is not None
    assert spread.mean == pytest.approx(np.mean(spreads), abs=1e-4)
    constant = results.spread("constant", 1)
    assert constant is not None
    assert constant.mean == 0


def test_strangers_do_not_change_when_places_are_added() -> None:
    places = [Place(i, uri, 32 * i, 32 * i + 32) for i, uri in enumerate("aabacb")]
    assert {n: p.number for n, p in strangers(places).items()} == {0: 2, 1: 2, 2: 1, 3: 2, 4: 3, 5: 4}
    for count in range(3, 6):
        fewer = strangers(places[:count])
        assert fewer == {number: strangers(places)[number] for number in fewer}
    with pytest.raises(ConfigError, match="another document"):
        strangers(places[:2])


def test_summaries_against_plain_arithmetic() -> None:
    rng = np.random.default_rng(0)
    names = [
        Condition(FULL),
        Condition(NONE),
        *(Condition(f"tree/{k}", 1, 0) for k in ("own", "shuffled", "mean_gist")),
    ]
    nll = rng.uniform(1, 2, (len(names), 6, 4)).round(6)
    nll[1] += 3
    samples = [
        (
            Place(i, f"doc{i % 3}", i, i + 1),
            [Measured(c.name, c.lod, c.tail_tokens, 1, nll[j, i].tolist(), 0.5) for j, c in enumerate(names)],
        )
        for i in range(6)
    ]
    results = GistResults.of(reversed(samples))
    full, none, own, shuffled, mean = nll
    setting = Setting(1, 0)
    assert results.settings == [setting]
    assert results.sources == ["tree"]
    assert results.content_nats("tree", setting).mean == pytest.approx((shuffled - own).mean())
    assert results.gain_over_constant("tree", setting).mean == pytest.approx((mean - own).mean())
    assert results.delta_nll(names[2]).mean == pytest.approx((own - full).mean())
    recovered = (none.mean() - own.mean()) / (none.mean() - full.mean())
    assert results.recovered_fraction(names[2]).mean == pytest.approx(recovered)
    np.testing.assert_allclose(results.curve(names[2], names[0]).mean, (own - full).mean(axis=0))
    # Clustered by document: sums of deviations of two places each.
    values = (shuffled - own).mean(axis=1)
    sums = (values - values.mean()).reshape(2, 3).sum(axis=0)
    error = np.sqrt((sums**2).sum() / 36 * 3 / 2)
    assert results.content_nats("tree", setting).standard_error == pytest.approx(error)
    (entry,) = [e for e in results.as_report() if e["condition"] == "tree/own"]
    assert entry["content_nats"] == pytest.approx((shuffled - own).mean())
    assert entry["recovered_fraction"] == pytest.approx(recovered)


def test_gain_is_over_the_best_constant() -> None:
    def measured(name: str, nll: float, spread: float = 0.0) -> Measured:
        return Measured(name, 1, 0, 1, [nll, nll], spread)

    found = [Measured(FULL, 0, 0, 1, [1.0, 1.0]), Measured(NONE, 0, 0, 0, [4.0, 4.0])]
    found += [measured("tree/own", 2, 0.9), measured("tree/shuffled", 3), measured("tree/mean_gist", 9)]
    found += [measured(f"learned/{kind}", 2.5) for kind in ("own", "shuffled", "mean_gist")]
    results = GistResults([(Place(i, f"doc{i}", 0, 1), found) for i in range(2)])
    assert results.best_constant("tree", Setting(1, 0)) == Condition("learned/own", 1, 0)
    assert results.gain_over_constant("tree", Setting(1, 0)).mean == pytest.approx(0.5)
    assert results.gain_over_constant("learned", Setting(1, 0)).mean == 0


def test_samples_come_back_and_another_choice_is_refused(tmp_path: Path, results: GistResults) -> None:
    path = tmp_path / "samples.jsonl"
    with GistSampleFile(path) as samples:
        for place, measured in results.samples[:2]:
            samples.append(place, measured)
    with path.open("a") as file:
        file.write('{"place": {"numb')
    places = [place for place, _ in results.samples]
    with GistSampleFile(path) as samples:
        assert samples.samples == results.samples[:2]
        assert samples.missing(places) == places[2:]
        with pytest.raises(ConfigError, match="another choice"):
            samples.missing([replace(place, uri="other") for place in places])
