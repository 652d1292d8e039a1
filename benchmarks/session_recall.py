"""What sessions find of what they have read, and what they answer, by who scores blocks.

Facts stand in real text that a context remembers. Every question has a session of its own, which reads that context:
half of the facts are asked for by name, half by a description that shares no word with what was read. An answer is
right where it holds the number. It is decoded past the next refocus, to see what becomes of the block that is needed.
With `--in_a_row` one session of each scorer is asked everything, and remembers earlier questions and answers, right or
wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

import numpy as np
import torch

from actors.plan import CompactionPlan, plan_models
from actors.session import Session, SessionSpec
from actors.session_turn import Turn
from actors.tasks.paraphrases import CONCEPTS
from actors.tasks.recall import draw_codes, recall_sentence
from actors.tasks.sample import Draws
from cluster.config import AUTO_GISTNET, BaseLMConfig, CorpusConfig, CorpusSplit, GistNetConfig, StoreConfig
from cluster.errors import ConfigError, MegaContextError
from cluster.session_config import SamplingConfig, SessionConfig
from cluster.tables import Table
from models.base_lm import BaseLM
from storage.contract import DocumentMeta
from storage.corpus import Document, open_corpus, read_corpus

ALONE = "the needed blocks alone"
"""The ceiling: what the model answers where nothing else is shown beside the newest tokens."""

SCORERS: Mapping[str, SessionConfig] = {
    "the newest tokens": SessionConfig(allocator="recency"),
    "words and keys": SessionConfig(lensnet="", layout="before_turn"),
    "words and keys, a turn of their own": SessionConfig(lensnet=""),
    "LensNet": SessionConfig(layout="before_turn"),
    "LensNet, a turn of its own, no leads": SessionConfig(lead_share=0.0),
    "LensNet, a turn of its own": SessionConfig(),
    ALONE: SessionConfig(lensnet="", lead_share=0.0),
}
"""By what stands in the table, how a session is focused."""

MEMORY = "memory"
"""The context that remembers the facts."""

BEHIND_SHARE = 0.1
"""Of the text stands between the last fact and the first question."""


@dataclass(frozen=True)
class Fact:
    """What is read, and how it is asked for."""

    key: str
    code: str
    question: str
    by_description: bool

    @property
    def sentence(self) -> str:
        """What is read."""
        return recall_sentence(self.key, self.code)


@dataclass(frozen=True)
class Asked:
    """What became of a question."""

    shown: bool
    """The whole sentence stands in raw tokens when the answer begins."""
    nearest: bool
    """Of the blocks that were found, it stands right before the question."""
    kept: bool
    """It is shown when the answer ends, too."""
    right: bool
    is_cut: bool = False
    """The sentence lies in several blocks."""


def make_facts(count: int, seed: int) -> list[Fact]:
    """Every other one is asked for by its name.

    Raises:
        ConfigError: more than there are things to speak of.
    """
    if not 2 <= count <= len(CONCEPTS):
        raise ConfigError(f"--facts={count} must be from 2 to {len(CONCEPTS)}")
    draws = Draws("session recall", seed)
    facts = []
    for number, (key, description) in enumerate(draws.sample(CONCEPTS, count)):
        by_description = number % 2 == 1
        question = (
            f"Which number belongs to {description}?"
            if by_description
            else f"What is the registration code of the {key}?"
        )
        facts.append(Fact(key, draw_codes(Draws("code", seed, number), 1)[0], question, by_description))
    return facts


def with_facts(lines: Sequence[str], facts: Sequence[Fact]) -> str:
    """The text with the facts between its lines, as far apart as each other, and text behind the last."""
    step = int(len(lines) * (1 - BEHIND_SHARE)) // len(facts)
    if step < 1:
        raise ConfigError(f"a text of {len(lines)} lines is too short for {len(facts)} facts; raise --tokens")
    parts = []
    for number, fact in enumerate(facts):
        parts += [*lines[number * step : (number + 1) * step], fact.sentence]
    return "\n".join([*parts, *lines[len(facts) * step :]])


def read_lines(texts: Sequence[str], split: str, num_tokens: int, plan: CompactionPlan) -> list[str]:
    """The first so many tokens of a corpus, as lines."""
    lines: list[str] = []
    for item in read_corpus(open_corpus(CorpusConfig(paths=list(texts), split=cast(CorpusSplit, split)))):
        if isinstance(item, Document):
            ids = plan.tokenizer.encode(item.text)[:num_tokens]
            lines += plan.tokenizer.decode(ids).splitlines()
            num_tokens -= len(ids)
        if num_tokens <= 0:
            return lines
    raise ConfigError(f"the texts have {num_tokens} tokens too few; give more --texts, or fewer --tokens")


def blocks_of(session: Session, facts: Sequence[Fact]) -> list[range]:
    """Blocks of the context that hold each sentence; the session has no other."""
    memory = session.memory
    texts = [memory.text(block, 0) for block in range(memory.histories()[0].num_blocks)]
    ends = np.cumsum([len(text) for text in texts])
    whole = "".join(texts)
    found = []
    for fact in facts:
        begin = whole.index(fact.sentence)
        first, last = np.searchsorted(ends, [begin, begin + len(fact.sentence) - 1], side="right").tolist()
        found.append(range(first, last + 1))
    return found


def raw_blocks(session: Session) -> set[int]:
    """Blocks of the first context that are shown in raw tokens."""
    assert session.focus is not None
    return {node.index for node in session.focus.wc.nodes() if node.lod == 0 and node.source == 0}


def ask(session: Session, fact: Fact, blocks: range, num_tokens: int) -> Asked:
    """Ask, and look at what is shown when the answer begins and when it ends.

    Raises:
        ConfigError: the search failed, and the newest tokens were shown instead.
    """
    sampling = SamplingConfig(do_sample=False, max_new_tokens=num_tokens, ignore_eos=True)
    shown = nearest = False
    turn = None
    for piece in session.ask(fact.question, sampling):
        if turn is None and not isinstance(piece, Turn):
            shown = raw_blocks(session).issuperset(blocks)
            nearest = bool(session.found_order) and session.found_order[-1] in {(block, 0) for block in blocks}
        turn = piece
    if session.warning:
        raise ConfigError(session.warning)
    assert isinstance(turn, Turn)
    return Asked(shown, nearest, raw_blocks(session).issuperset(blocks), fact.code in turn.text, len(blocks) > 1)


class Memory:
    """A context of its own that holds facts, and sessions that are asked for them."""

    def __init__(self, root: Path, plan: CompactionPlan, lm: BaseLM, text: str, facts: Sequence[Fact]) -> None:
        """Read the text."""
        self._root = root
        self._plan = plan
        self._lm = lm
        self._facts = facts
        self._talks = 0
        with contextlib.closing(self._session(MEMORY, (), SessionConfig())) as session:
            session.read(DocumentMeta("text", "memory://text"), text)
            self._blocks = blocks_of(session, facts)

    def _session(self, context: str, reads: tuple[str, ...], config: SessionConfig) -> Session:
        store = StoreConfig(root=self._root, context=context)
        return Session(SessionSpec(self._plan, store, reads, config), self._lm)

    def ask_all(self, config: SessionConfig, num_tokens: int, *, in_a_row: bool) -> list[Asked]:
        """Every fact, of one session or of one each."""
        asked: list[Asked] = []
        left = list(zip(self._facts, self._blocks, strict=True))
        while left:
            self._talks += 1
            with contextlib.closing(self._session(f"talk-{self._talks}", (MEMORY,), config)) as session:
                for fact, blocks in left if in_a_row else left[:1]:
                    asked.append(ask(session, fact, blocks, num_tokens))
            left = [] if in_a_row else left[1:]
        return asked

    def ask_alone(self, config: SessionConfig, num_tokens: int) -> list[Asked]:
        """Every fact, of a session each that shows the needed blocks and no other that was found."""
        asked: list[Asked] = []
        for fact, blocks in zip(self._facts, self._blocks, strict=True):
            self._talks += 1
            only = replace(config, max_blocks=len(blocks))
            with contextlib.closing(self._session(f"talk-{self._talks}", (MEMORY,), only)) as session:
                for block in blocks:
                    session.expand(block, 0)
                asked.append(ask(session, fact, blocks, num_tokens))
        return asked


def tables(asked: Mapping[str, Sequence[Asked]], facts: Sequence[Fact], remembered: int) -> list[Table]:
    """Shares of every scorer, and right answers compared question by question."""
    described = np.array([fact.by_description for fact in facts])
    rows, pairs = [], []
    for name, of in asked.items():
        right = np.array([a.right for a in of])
        rows.append(
            {
                "scored by": name,
                "shown": _share([a.shown for a in of]),
                "of those a border cuts": _share([a.shown for a in of if a.is_cut]),
                "stands nearest": _share([a.nearest for a in of]),
                "shown to the end": _share([a.kept for a in of]),
                "right": _share(right),
                "by name": _share(right[~described]),
                "by description": _share(right[described]),
            }
        )
        for other, theirs in list(asked.items())[: list(asked).index(name)]:
            gain = right.astype(float) - [a.right for a in theirs]
            pairs.append(
                {
                    "scored by": name,
                    "over": other,
                    "right, points": _points(gain),
                    "by name": _points(gain[~described]),
                    "by description": _points(gain[described]),
                }
            )
    num_cut = max((sum(a.is_cut for a in of) for of in asked.values()), default=0)
    where = (
        f"{len(facts)} questions about {remembered:,} tokens, {SessionConfig().budget} slots; {num_cut} facts are cut"
    )
    return [Table(rows, where), Table(pairs, f"Question by question: {where}")]


def _share(values: Sequence[bool] | np.ndarray) -> str:
    share = np.asarray(values, float)
    if len(share) < 2:
        return "too few"
    return f"{share.mean():.0%} ± {_error(share):.0%}"


def _points(gains: np.ndarray) -> str:
    return f"{100 * gains.mean():+.1f} ± {100 * _error(gains):.1f}"


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / len(values) ** 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, ask, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.session_recall", description=__doc__)
    parser.add_argument("--texts", nargs="+", default=["package:prose"], help="what stands around the facts")
    parser.add_argument("--split", choices=get_args(CorpusSplit), default="held_out", help="part of the texts")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the texts")
    parser.add_argument("--facts", type=int, default=64, help=f"that are read and asked for, up to {len(CONCEPTS)}")
    parser.add_argument("--rounds", type=int, default=2, help="contexts, of other facts each")
    parser.add_argument("--in_a_row", action="store_true", help="ask one session everything")
    parser.add_argument("--answer_tokens", type=int, default=48, help="decoded; there is a refocus after every 32")
    parser.add_argument("--only", nargs="+", choices=list(SCORERS), metavar="SCORER", help=f"of {', '.join(SCORERS)}")
    parser.add_argument("--seed", type=int, default=0, help="of the facts")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: all cores")
    parser.add_argument("--lm", default="smollm2-135m", help="who answers")
    parser.add_argument("--gistnet", default=AUTO_GISTNET, help="folder of a GistNet; auto: the one that comes along")
    parser.add_argument("--cache_dir", type=Path, default=BaseLMConfig().cache_dir, help="where models are kept")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    # A session that was asked for other things before shows them, too: there is no needed block alone.
    names = [name for name in options.only or SCORERS if not (options.in_a_row and name == ALONE)]
    asked: dict[str, list[Asked]] = {name: [] for name in names}
    all_facts: list[Fact] = []
    try:
        config = BaseLMConfig(source=options.lm, dtype=options.dtype, device="cpu", cache_dir=options.cache_dir)
        plan = plan_models(config, GistNetConfig(path=options.gistnet), StoreConfig(root=Path("unused")))
        lines = read_lines(options.texts, options.split, options.tokens, plan)
        lm = BaseLM.load(plan.base_lm)
        for number in range(options.rounds):
            facts = make_facts(options.facts, options.seed + number)
            all_facts += facts
            with tempfile.TemporaryDirectory() as folder:
                memory = Memory(Path(folder), plan, lm, with_facts(lines, facts), facts)
                for name in names:
                    if name == ALONE:
                        asked[name] += memory.ask_alone(SCORERS[name], options.answer_tokens)
                    else:
                        asked[name] += memory.ask_all(SCORERS[name], options.answer_tokens, in_a_row=options.in_a_row)
                    right = sum(a.right for a in asked[name])
                    print(f"round {number + 1}: {name}: {right} of {len(asked[name])} right", file=sys.stderr)
    except MegaContextError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for table in tables(asked, all_facts, options.tokens):
        table.show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
