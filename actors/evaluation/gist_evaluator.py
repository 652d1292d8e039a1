"""One place after another: a history replaced by gists, by controls, by nothing, and what the model then predicts.

Every condition predicts the same horizon from the same places on the timeline. Of every source of gists there are
three: its own, those of another document's history at the same positions (`shuffled`), and its mean gist everywhere
(`mean_gist`). What own gists win over the other two is what they say of this history. A model that has an adapter reads
everything with it but the raw history (`full`), for which it was not trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from actors.evaluation.contents import Contents, Reading
from actors.evaluation.gist_sources import EncodedGists, GistSource, TreeGists
from actors.evaluation.places import Place
from actors.evaluation.scorer import Scorer
from cluster.config import BLOCKS_PER_SUPER_BLOCK, BaseLMConfig, StoreConfig
from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import ConfigError
from cluster.gist_evaluation_config import GistEvaluationConfig
from models.base_lm import BaseLM
from models.focus.history import History, blocks_per_node
from models.gistnet import GistNet
from storage.contract import TreeReader
from storage.store import Store

FULL, NONE, RECENCY = "full", "none", "recency"
OWN, SHUFFLED, MEAN_GIST = "own", "shuffled", "mean_gist"

NLL_DIGITS = 6
"""Decimals of a nat that are kept: as many as the model's own rounding leaves."""


@dataclass(frozen=True)
class Condition:
    """What stands before the horizon."""

    name: str
    """`full`, `none`, `recency` (`recency/m2` beside gists of 2 vectors where the tree has others), or
    `<source>/own|shuffled|mean_gist`."""
    lod: int = 0
    """Of the gists it shows, or whose cost it has. 0: neither."""
    tail_tokens: int = 0
    """Raw tokens at the end; in `recency` already counted."""


@dataclass(frozen=True)
class Measured:
    """One condition at one place."""

    name: str
    lod: int
    tail_tokens: int
    slots: int
    """Rows the model read before the horizon."""
    nll: list[float]
    """Of the horizon's tokens but the first, nats."""
    spread: float = 0.0
    """Of own gists: `GistSource.spread`."""

    @property
    def condition(self) -> Condition:
        """Which."""
        return Condition(self.name, self.lod, self.tail_tokens)


@dataclass(frozen=True)
class GistEvaluatorSpec:
    """Everything a worker needs to measure the same anywhere."""

    base_lm: BaseLMConfig
    """With an explicit dtype."""
    store: StoreConfig
    seq: int
    """Version of the context, so that all workers read the same."""
    evaluation: GistEvaluationConfig
    places: tuple[Place, ...]
    """All of them: a place's shuffled gists are another's own."""
    net_names: tuple[str, ...]
    """Names of the nets that `build` is given."""

    def build(self, gistnets: list[GistNet]) -> GistEvaluator:
        """The evaluator, of these nets beside the tree's own gists."""
        lm = BaseLM.load(self.base_lm)
        reader = Store(self.store.root).open_reader(self.store.context, seq=self.seq)
        sources: list[GistSource] = [TreeGists(reader)]
        sources += [EncodedGists(name, net, lm, reader) for name, net in zip(self.net_names, gistnets, strict=True)]
        return GistEvaluator(self.evaluation, lm, reader, sources, strangers(self.places))


def strangers(places: Sequence[Place]) -> dict[int, Place]:
    """For every place's number the place whose gists are its shuffled ones: the nearest before it of another
    document, for the first ones the nearest after; so places added at the end change nothing for the others.

    Raises:
        ConfigError: all places are of one document.
    """
    found: dict[int, Place] = {}
    for index, place in enumerate(places):
        others = (*reversed(places[:index]), *places[index + 1 :])
        stranger = next((other for other in others if other.uri != place.uri), None)
        if stranger is None:
            raise ConfigError(
                f"all places lie in {place.uri!r}; shuffled gists come from another document. Lower "
                "evaluation.history_tokens, or compact more long documents."
            )
        found[place.number] = stranger
    return found


class GistEvaluator:
    """Measures places. Plain class; `workers.EvaluatorActor` hosts it."""

    def __init__(
        self,
        config: GistEvaluationConfig,
        lm: BaseLM,
        reader: TreeReader,
        sources: Sequence[GistSource],
        strangers: dict[int, Place],
    ) -> None:
        """Measure `sources`, of which the first is the tree itself."""
        self._config = config
        self._lm = lm
        self._reader = reader
        self._sources = sources
        self._strangers = strangers
        self._scorer = Scorer(lm, config.positional)

    def evaluate(self, place: Place) -> list[Measured]:
        """Every condition at one place."""
        horizon = self._config.horizon_tokens
        history = History.of(self._reader, place.first_block, place.stop_block)
        reading = Reading(self._lm, self._reader, history)
        ids = reading.ids(place.stop_block, -(-horizon // K))[:horizon]
        known: dict[tuple[bytes, bool], list[float]] = {}
        measured = []
        for condition, contents, spread in self._conditions(reading, place):
            # What a constant net says is the same three times: equal contents are read once.
            stock = condition.name == FULL or self._lm.adapter is None
            key = (contents.digest(), stock)
            if key not in known:
                with contextlib.nullcontext() if stock else self._lm.adapted():
                    nll = self._scorer.nll(contents, ids, history.num_tokens)
                known[key] = [round(value, NLL_DIGITS) for value in nll.tolist()]
            measured.append(
                Measured(
                    condition.name,
                    condition.lod,
                    condition.tail_tokens,
                    contents.num_rows,
                    known[key],
                    round(spread, NLL_DIGITS),
                )
            )
        return measured

    def _conditions(self, reading: Reading, place: Place) -> Iterator[tuple[Condition, Contents, float]]:
        config = self._config
        full = reading.raw(range(place.first_block, place.stop_block))
        yield Condition(FULL), full, 0.0
        first = self._first(full)
        for tail in config.tail_tokens:
            newest = full.rows(full.num_rows - tail, full.num_rows)
            yield Condition(NONE, 0, tail), Contents.joined([first, newest]), 0.0
        for lod in config.lods:
            for tail in config.tail_tokens:
                num_blocks = place.stop_block - place.first_block - tail // K
                if num_blocks < blocks_per_node(lod):
                    continue
                yield from self._with_gists(full, place, lod, tail, num_blocks)

    def _with_gists(
        self, full: Contents, place: Place, lod: int, tail: int, num_blocks: int
    ) -> Iterator[tuple[Condition, Contents, float]]:
        raw_tail = full.rows(full.num_rows - tail, full.num_rows)
        first = self._first(full)
        own_vectors = self._sources[0].num_vectors
        for num_vectors in sorted({source.num_vectors for source in self._sources}):
            cost = min(full.num_rows, num_nodes(num_blocks, lod) * num_vectors + tail + first.num_rows)
            name = RECENCY if num_vectors == own_vectors else f"{RECENCY}/m{num_vectors}"
            yield Condition(name, lod, tail), full.rows(full.num_rows - cost, full.num_rows), 0.0
        stranger = self._strangers[place.number]
        for source in self._sources:
            spread = source.spread(place, lod)
            for kind, of in ((OWN, place), (SHUFFLED, stranger), (MEAN_GIST, None)):
                gists = self._stand_ins(source, of, lod, num_blocks)
                condition = Condition(f"{source.name}/{kind}", lod, tail)
                yield condition, Contents.joined([first, gists, raw_tail]), spread if kind == OWN else 0.0

    def _first(self, full: Contents) -> Contents:
        """The history's first token, where it is shown."""
        return full.rows(0, int(self._config.first_token))

    def _stand_ins(self, source: GistSource, place: Place | None, lod: int, num_blocks: int) -> Contents:
        """Gists in place of a history's first blocks; of no place: the constant.

        Nodes of the level where they are whole, LOD1 for the blocks left behind the last of them.
        """
        parts = []
        first = 0
        for level in sorted({lod, 1}, reverse=True):
            size = blocks_per_node(level)
            nodes = np.arange(first // size, num_blocks // size)
            first = (num_blocks // size) * size
            if place is None:
                gists = source.constant(level).expand(len(nodes), -1, -1)
            else:
                gists = source.nodes(place, level)[torch.from_numpy(nodes)]
            # A node covers tokens 32b … 32(b + size) - 1; its m vectors all stand at the centre.
            centres = np.repeat(2 * K * size * nodes + K * size - 1, source.num_vectors)
            rows = gists.reshape(-1, gists.shape[-1]).to(self._lm.device, self._lm.dtype)
            parts.append(Contents(rows, centres))
        return Contents.joined(parts)


def num_nodes(num_blocks: int, lod: int) -> int:
    """Gists that stand in for blocks: whole nodes of the level, LOD1 for the rest."""
    if lod == 1:
        return num_blocks
    return num_blocks // BLOCKS_PER_SUPER_BLOCK + num_blocks % BLOCKS_PER_SUPER_BLOCK
