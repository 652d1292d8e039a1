"""Tasks over a small tree: who shows the needle, what is counted, and that a seed gives the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.evaluation import rivals
from actors.evaluation.contents import Reading
from actors.evaluation.rivals import Condition
from actors.evaluation.task_evaluator import TaskEvaluator, TaskMeasured, shown_whole, tasks_of
from actors.evaluation.task_places import TaskPlace, choose_task_places
from actors.plan import CompactionPlan
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.config import BaseLMConfig
from cluster.errors import ConfigError
from cluster.evaluation_config import RetrievalConfig
from cluster.task_evaluation_config import TaskEvaluationConfig
from models.base_lm import BaseLM
from models.focus.history import History
from models.lensnet import LensNetSpec
from models.lensnet.net import untrained_lensnet
from models.sentence_encoder import SentenceEncoder
from storage.contract import TreeReader
from storage.lexical.index import LexicalWriter
from storage.lexical.search import LexicalSearcher
from storage.tree.writer import ContextWriter
from tests.actors.helpers import follow, ingest, make_compactor, make_documents, open_context, tiny_plan

LENGTH = 8192
BUDGET = 900
"""Tokens are bytes: a question has about 110 and a needle three or four blocks."""


@dataclass
class Setting:
    plan: CompactionPlan
    writer: ContextWriter
    reader: TreeReader
    lm: BaseLM

    def evaluator(self, config: TaskEvaluationConfig) -> TaskEvaluator:
        config.validate()
        tokenizer = self.plan.tokenizer
        return TaskEvaluator(
            config,
            self.lm,
            self.plan.gistnet,
            make_compactor(self.plan),
            tokenizer,
            self.reader,
            LexicalSearcher(self.writer.folder, tokenizer.decode_batch),
        )

    def places(self, config: TaskEvaluationConfig) -> list[TaskPlace]:
        return choose_task_places(
            self.reader,
            tasks_of(config.tasks),
            config.num_samples,
            config.history_tokens,
            config.depth_percents,
            tail_tokens=config.tail_tokens,
            seed=config.seed,
        )

    def measured(self, config: TaskEvaluationConfig) -> list[list[TaskMeasured]]:
        evaluator = self.evaluator(config)
        return [evaluator.evaluate(place) for place in self.places(config)]


def config_of(**fields: Any) -> TaskEvaluationConfig:
    given: dict[str, Any] = {
        "tasks": ["single_numbers"],
        "num_samples": 2,
        "history_tokens": [LENGTH],
        "budgets": [BUDGET],
        "rivals": [chooser for chooser in rivals.TASK_CHOOSERS if chooser not in {rivals.MINILM, rivals.LENSNET}],
        "forms": ["raw", "overlay"],
        "retrieval": RetrievalConfig(fusion=["bm25", "dense"]),
        "tail_tokens": 64,
        "max_blocks": 8,
        "generate": False,
    }
    return TaskEvaluationConfig(**{**given, **fields})


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_lm_config: BaseLMConfig) -> Iterator[Setting]:
    root: Path = tmp_path_factory.mktemp("tasks")
    plan = tiny_plan(tiny_lm_config, root)
    writer = open_context(root, plan)
    ingest(writer, plan, make_compactor(plan), make_documents([3000, 2500]))
    follow(writer, plan)
    with LexicalWriter(writer.folder, plan.tokenizer.decode_batch) as index:
        index.advance(writer.reader())
    yield Setting(plan, writer, writer.reader(), BaseLM.load(tiny_lm_config))
    writer.close()


def by_name(measured: list[TaskMeasured]) -> dict[str, TaskMeasured]:
    return {m.condition: m for m in measured}


def net_of_words(folder: Path) -> str:
    """A LensNet that is told the lexical rank alone, and shows what is among the first three."""
    net = untrained_lensnet(LensNetSpec(features=("lexical_rank",), hidden_dim=4, num_heads=1, num_layers=0))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.norm.weight.fill_(1.0)
        net.read_features.weight[0, 0] = 1.0  # one unit has the reciprocal rank, one the threshold
        net.read_features.bias[1] = 0.3
        net.score.weight[0] = torch.tensor([0.1, -0.1, 0.0, 0.0])
    net.save(folder)
    return str(folder)


def test_lensnet_is_asked_with_the_question_about_planted_text(setting: Setting, tmp_path: Path) -> None:
    config = config_of(
        depth_percents=[0, 50], rivals=["lensnet", "bm25"], forms=["raw"], max_blocks=3, lensnet=net_of_words(tmp_path)
    )
    for measured in setting.measured(config):
        found = by_name(measured)
        # The needle is not in the tree's lexical index, and no word of it is in the history's own tail.
        assert found["lensnet/raw"].recall > 0
        assert found["lensnet/raw"].picked[0] == found["bm25/raw"].picked[0]
        assert set(found["lensnet/raw"].picked) <= set(found["bm25/raw"].picked)
    with pytest.raises(ConfigError, match="needs a net"):
        config_of(rivals=["lensnet/raw"]).validate()


def test_bm25_and_the_oracle_show_a_deep_needle_and_recency_does_not(setting: Setting) -> None:
    config = config_of(depth_percents=[0, 50])
    for measured in setting.measured(config):
        found = by_name(measured)
        # A history of 8,192 slots is longer than the model's range.
        assert "full" not in found
        for form in config.forms:
            # A needle's last block may hold the end of its value alone, which the question does not name.
            assert found[f"bm25/{form}"].recall >= 0.6
            assert found[f"bm25/{form}"].recall > found[f"random/{form}"].recall
            assert found[f"recency/{form}"].recall == 0
            assert found[f"oracle/{form}"].feasible
        assert found["needles"].recall == 1
        assert found["none"].recall == 0


def test_needles_shows_exactly_the_needed_blocks_and_the_tail(setting: Setting) -> None:
    config = config_of(tasks=["three_facts"], rivals=["needles"])
    evaluator = setting.evaluator(config)
    place = setting.places(config)[0]
    question = evaluator.planter.question(place)
    reading = Reading(setting.lm, question.reader, History.of(question.reader, place.first_block, place.stop_block))
    shown = evaluator._shown(Condition(rivals.NEEDLES), question, reading, (), 0)
    expected = sorted({*question.needed.tolist(), place.stop_block - 2, place.stop_block - 1})
    assert shown.blocks.tolist() == expected
    tokens = np.concatenate([question.reader.tokens(block, 1)[0][0] for block in expected])
    assert torch.equal(shown.contents.embeds, setting.lm.embed(torch.from_numpy(tokens.astype(np.int64))[None])[0])
    needed = [needle.text for needle in question.sample.needles if needle.needed]
    text = setting.plan.tokenizer.decode(tokens)
    assert len(needed) >= 1
    assert all(needle in text for needle in needed)
    # And the text is where the blocks say it is, in no other.
    rest = [block for block in range(place.first_block, place.stop_block) if block not in set(expected)]
    others = setting.plan.tokenizer.decode_batch([question.reader.tokens(block, 1)[0][0] for block in rest])
    assert not any(needle in "".join(others) for needle in needed)


def test_slots_never_exceed_the_budget_and_count_the_question(setting: Setting) -> None:
    config = config_of(budgets=[500, BUDGET], forms=["raw", "overlay", "strict"], tasks=["recall_literal"])
    config = replace(config, rivals=["none", "recency", "uniform", "bm25", "oracle"])
    evaluator = setting.evaluator(config)
    for place in setting.places(config):
        num_asked = len(evaluator.planter.question(place).query)
        for m in evaluator.evaluate(place):
            if m.condition == "none":
                assert m.slots == num_asked
            elif m.budget:
                assert m.slots <= m.budget
                if m.condition.endswith("/raw"):
                    assert m.slots == m.budget


def test_infeasible_is_what_no_choice_could_show(setting: Setting) -> None:
    config = config_of(tasks=["variable_tracking", "single_numbers"], max_blocks=4, rivals=["bm25", "needles"])
    for place, measured in zip(setting.places(config), setting.measured(config), strict=True):
        for m in measured:
            assert m.feasible == (m.condition == "needles" or m.num_needed <= config.max_blocks)
            if place.task == "variable_tracking":
                assert m.num_needed > 4
    tight = config_of(forms=["strict", "raw"], rivals=["bm25"], budgets=[270], tail_tokens=32)
    found = [by_name(measured) for measured in setting.measured(tight)]
    # One far block costs 31 gists more in a strict tiling, so 270 slots hold needles raw and none so.
    assert [(m["bm25/raw"].feasible, m["bm25/strict"].feasible) for m in found] == [(True, False)] * 2
    assert all(m["bm25/strict"].recall < 1 for m in found)


def test_identical_contents_give_identical_answers_and_full_equals_all_of_it_raw(setting: Setting) -> None:
    config = config_of(history_tokens=[1024], budgets=[1300], rivals=["full", "recency", "bm25", "none"], forms=["raw"])
    config = replace(config, generate=True)
    for measured in setting.measured(config):
        found = by_name(measured)
        full = replace(found["full"], condition="", budget=0, decide_s=0, read_s=0, picked=[])
        for name in ("recency/raw", "bm25/raw"):
            assert replace(found[name], condition="", budget=0, decide_s=0, read_s=0, picked=[]) == full
        assert full.recall == 1
        assert found["none"].answer_nll != full.answer_nll


def test_a_seed_gives_the_same_numbers_in_any_order(setting: Setting) -> None:
    config = config_of(tasks=["ask_again"], depth_percents=[10], forms=["overlay"])
    config = replace(config, rivals=["random", "bm25", "dense", "oracle"])

    def numbers(found: list[TaskMeasured]) -> list[TaskMeasured]:
        return [replace(m, decide_s=0, read_s=0) for m in found]

    places = setting.places(config)
    forwards, backwards = setting.evaluator(config), setting.evaluator(config)
    one = [numbers(forwards.evaluate(place)) for place in places]
    other = [numbers(backwards.evaluate(place)) for place in reversed(places)]
    assert one == other[::-1]
    other_seed = replace(config, seed=1, depth_percents=[10], rivals=["bm25"])
    assert {found[0].cluster for found in setting.measured(other_seed)}.isdisjoint({found[0].cluster for found in one})
    # A session's turns share its history and are one cluster.
    assert len({found[0].cluster for found in one}) == 1
    assert len({place.stop_block for place in places}) == 1


def test_rivals_may_have_a_form_and_a_policy_of_their_own(setting: Setting) -> None:
    named = ["bm25", "bm25/raw@global", "bm25/raw@compact", "recency/overlay", "recency/overlay@compact"]
    config = config_of(history_tokens=[1024], forms=["raw"], rivals=named, budgets=[400])
    by_policy = {
        policy: by_name(setting.measured(replace(config, positional=policy, rivals=named[:1] + named[3:4]))[0])
        for policy in ("auto", "global", "compact")
    }
    measured = setting.measured(config)[0]
    assert [m.condition for m in measured] == ["bm25/raw", *named[1:]]
    for m in measured:
        rival, _, policy = m.condition.partition("@")
        expected = by_policy[policy or "auto"][rival]
        assert replace(m, condition=rival, decide_s=0, read_s=0) == replace(expected, decide_s=0, read_s=0)
    # 1,024 tokens and a question are within the model's range.
    assert by_policy["auto"]["bm25/raw"].answer_nll == by_policy["global"]["bm25/raw"].answer_nll
    assert by_policy["compact"]["bm25/raw"].answer_nll != by_policy["global"]["bm25/raw"].answer_nll


def test_the_oracle_chooses_beside_gists_where_any_rival_shows_them(setting: Setting) -> None:
    """By the forms of the rivals themselves, whatever `forms` says of the others."""
    usual = {"history_tokens": [1024]}
    alike = [
        setting.measured(config_of(**usual, forms=forms, rivals=named))[0]
        for forms, named in (
            (["raw", "overlay"], ["oracle"]),
            (["raw"], ["oracle", "oracle/overlay"]),
            (["strict"], ["oracle/raw", "oracle/overlay"]),
        )
    ]
    picked = [[(m.condition, m.picked, m.answer_nll) for m in measured] for measured in alike]
    assert picked[0] == picked[1] == picked[2]
    # A budget that holds no Working Context is enough where nobody shows one.
    tight = config_of(**usual, forms=["overlay"], rivals=["oracle/raw"], budgets=[225], tail_tokens=32)
    (m,) = setting.measured(tight)[0]
    assert m.slots == 225


@pytest.mark.real_model
def test_sentence_embeddings_are_asked_with_the_question_alone(setting: Setting) -> None:
    """Of the planted text, at every place anew."""
    config = config_of(history_tokens=[1024], rivals=["minilm/raw"], max_blocks=3)
    evaluator, encoder, tokenizer = setting.evaluator(config), SentenceEncoder.load(), setting.plan.tokenizer
    for place in setting.places(config):
        question = evaluator.planter.question(place)
        blocks = np.arange(place.first_block, place.stop_block - config.tail_tokens // K)
        texts = tokenizer.decode_batch([question.reader.tokens(int(block), 1)[0][0] for block in blocks])
        cosines = encoder.encode(texts) @ encoder.encode([tokenizer.decode(question.query)])[0]
        (m,) = evaluator.evaluate(place)
        assert m.picked == blocks[np.argsort(-cosines)[:3]].tolist()
        assert m.recall == np.isin(question.needed, m.picked).mean() > 0


def test_shown_whole_leaves_out_blocks_that_are_cut(setting: Setting) -> None:
    reader = setting.reader
    history = History.of(reader, 32, 96)
    reading = Reading(setting.lm, reader, history)
    contents = reading.raw([33, 40, 95])
    assert shown_whole(history, contents).tolist() == [33, 40, 95]
    assert shown_whole(history, contents.rows(1, contents.num_rows)).tolist() == [40, 95]
    assert shown_whole(history, reading.nothing()).tolist() == []
    assert rivals.tail_blocks(reading, 3 * K) == [93, 94, 95]
    assert rivals.tail_blocks(reading, K - 1) == []


def test_an_unknown_task_or_rival_is_refused(setting: Setting) -> None:
    with pytest.raises(ConfigError, match=r"no task 'nothing'.*single_words"):
        tasks_of(["nothing"])
    for rival, message in (
        ("rerank", r"no rival 'rerank'.*needles"),
        ("exhaustive", r"no rival 'exhaustive'"),
        ("bm25/constant", r"no form 'constant'; there are: raw, late, late_ranked, late64, overlay, strict$"),
        ("bm25/raw@auto", r"no position policy 'auto'"),
        ("needles/raw", r"rival 'needles' has neither forms nor policies"),
    ):
        with pytest.raises(ConfigError, match=message):
            setting.evaluator(config_of(rivals=[rival]))
