"""Tuning the searchers on measured gains: every setting ranks the blocks of every place, and is worth its first picks.

The language model reads a few hundred tokens a place, whatever the settings: states of the newest tokens are computed
once and sliced, blocks are embedded once.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from actors.evaluation.contents import Reading
from actors.evaluation.measured_gains import PickScore, PlaceGains
from actors.evaluation.retrieval import RANKED_BLOCKS, Retrieval
from actors.evaluation.retrieval_settings import (
    Bm25Setting,
    DenseSetting,
    FusionSetting,
    SearchSetting,
    Setting,
    default_of,
    fusion_grid,
    search_grid,
)
from actors.evaluation.statistics import Estimate, clustered_mean
from cluster.evaluation_config import RetrievalConfig
from cluster.tuning_config import RetrievalTuningConfig
from models.base_lm import BaseLM
from models.focus.allocators import RankedBlocks, reciprocal_rank_fusion
from models.focus.block_embeddings import BlockEmbeddings
from models.focus.dense import KeyIndex, KeySpace
from models.focus.history import History
from models.gistnet import GistNet
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical.search import LexicalSearcher
from storage.schema import KEYS

Metric = Literal["gain_at_1", "gain_at_k", "hit_at_1", "best_rank", "num_picked"]
METRICS: tuple[Metric, ...] = ("gain_at_1", "gain_at_k", "hit_at_1", "best_rank", "num_picked")

CHANCE, NEWEST, SPLIT_HALF, BEST = "chance", "newest", "best_split_half", "best_measured"
REFERENCES = (CHANCE, NEWEST, SPLIT_HALF, BEST)
"""What settings are compared with: any blocks; those just before the tail; the best, chosen on one half of the horizon
and scored on the other; the best on both, which counts noise as gain."""


@dataclass(frozen=True)
class TuningResults:
    """What every setting's order is worth at every place, and what else could have been shown there."""

    gains: Sequence[PlaceGains]
    picks: int
    scores: dict[Setting | str, np.ndarray]
    """`(places, 5)`, columns as `METRICS`, of every setting and of `REFERENCES`."""

    @property
    def searchers(self) -> list[str]:
        """Those that were tuned."""
        return list(dict.fromkeys(key.searcher for key in self.scores if not isinstance(key, str)))

    def settings(self, searcher: str) -> list[Setting]:
        """All of a searcher, the best by gain@k first; of equals the default, then the order of the grid."""
        found = [key for key in self.scores if not isinstance(key, str) and key.searcher == searcher]
        default = default_of(searcher)
        return sorted(found, key=lambda setting: (-self.values(setting, "gain_at_k").mean(), setting != default))

    def best(self, searcher: str) -> Setting:
        """The best of those that a configuration can set, beside the best of the other searchers."""
        return next(setting for setting in self.settings(searcher) if self._can_be_set(setting))

    def _can_be_set(self, setting: Setting) -> bool:
        if isinstance(setting, FusionSetting):
            return all(member == self.best(member.searcher) for member in setting.members)
        return setting.keys is not None

    def values(self, key: Setting | str, metric: Metric) -> np.ndarray:
        """`(places,)`."""
        return self.scores[key][:, METRICS.index(metric)]

    def mean(self, key: Setting | str, metric: Metric) -> Estimate:
        """Over places, with a standard error by document."""
        return clustered_mean(self.values(key, metric), self.documents)

    def over_default(self, setting: Setting, metric: Metric) -> Estimate | None:
        """Paired difference to the default setting; None for itself, and where that was not searched."""
        default = default_of(setting.searcher)
        if setting == default or default not in self.scores:
            return None
        return clustered_mean(self.values(setting, metric) - self.values(default, metric), self.documents)

    @functools.cached_property
    def documents(self) -> list[str]:
        """Document of each place."""
        return [gains.place.uri for gains in self.gains]

    def winners(self) -> dict[str, Any]:
        """The best settings as keys of `evaluation.retrieval`."""
        return {name: value for searcher in self.searchers for name, value in (self.best(searcher).keys or {}).items()}

    def as_report(self) -> dict[str, Any]:
        """For `report.json`."""
        searchers = {
            searcher: [
                {
                    **setting.columns,
                    "default": setting == default_of(searcher),
                    **self._numbers(setting),
                    **_estimate("gain_at_k_over_default", self.over_default(setting, "gain_at_k")),
                    **_estimate("gain_at_1_over_default", self.over_default(setting, "gain_at_1")),
                }
                for setting in self.settings(searcher)
            ]
            for searcher in self.searchers
        }
        references = {name: self._numbers(name) for name in REFERENCES}
        return {"searchers": searchers, "references": references, "winners": self.winners()}

    def _numbers(self, key: Setting | str) -> dict[str, float]:
        return {name: value for metric in METRICS for name, value in _estimate(metric, self.mean(key, metric)).items()}


def _estimate(name: str, estimate: Estimate | None) -> dict[str, float]:
    return {} if estimate is None else {name: estimate.mean, f"{name}_se": estimate.standard_error}


class RetrievalTuner:
    """Ranks by every setting, a place at a time; then fuses the best of them."""

    def __init__(
        self,
        lm: BaseLM,
        gistnet: GistNet,
        reader: TreeReader,
        lexical: LexicalSearcher,
        tokenizer: Tokenizer,
        embeddings: BlockEmbeddings | None,
        config: RetrievalTuningConfig,
    ) -> None:
        """Args: as of `Retrieval`; `lm` needs the layers the net reads; `embeddings` where `minilm` is tuned."""
        self._lm = lm
        self._gistnet = gistnet
        self._reader = reader
        self._lexical = lexical
        self._tokenizer = tokenizer
        self._embeddings = embeddings
        self._config = config
        self._grid = search_grid(config)
        own, centred = KeySpace.of_net(gistnet, reader, array=KEYS), KeySpace.of_tree(reader, array=KEYS, whiten=False)
        self._spaces = {True: own, False: centred}
        self._gains: list[PlaceGains] = []
        self._ranked: dict[SearchSetting, list[np.ndarray]] = defaultdict(list)

    def search(self, gains: PlaceGains) -> None:
        """Rank the blocks of one place by every setting of the grid."""
        place = gains.place
        history = History.of(
            self._reader, place.first_block, place.stop_block, vectors_per_node=self._gistnet.num_vectors
        )
        retrieval = Retrieval(
            Reading(self._lm, self._reader, history),
            self._lexical,
            self._tokenizer,
            self._gistnet,
            self._spaces[True],
            gains.shown_from,
            RetrievalConfig(),
            self._embeddings,
            limit=len(gains.blocks),
        )
        search = _PlaceSearch(retrieval, self._spaces, self._grid)
        self._gains.append(gains)
        for setting in self._grid:
            self._ranked[setting].append(np.array([block for block, _ in search.ranked(setting)], np.int64))

    def results(self) -> TuningResults:
        """Of all places that were searched."""
        picks = self._config.picks
        scores: dict[Setting | str, np.ndarray] = {
            CHANCE: _rows([gains.chance(picks) for gains in self._gains]),
            NEWEST: _rows([gains.score(gains.newest(), picks) for gains in self._gains]),
            SPLIT_HALF: _rows([gains.split_half(picks) for gains in self._gains]),
            BEST: _rows([gains.score(gains.best(), picks) for gains in self._gains]),
        }
        scores |= {setting: self._scored(ranked) for setting, ranked in self._ranked.items()}
        single = TuningResults(self._gains, picks, scores)
        best = [single.best(searcher) for searcher in single.searchers]
        for fused in fusion_grid([b for b in best if not isinstance(b, FusionSetting)], self._config.fusion_constants):
            scores[fused] = self._scored(self._fuse(fused))
        return TuningResults(self._gains, picks, scores)

    def _scored(self, ranked: Sequence[np.ndarray]) -> np.ndarray:
        return _rows([g.score(blocks, self._config.picks) for g, blocks in zip(self._gains, ranked, strict=True)])

    def _fuse(self, setting: FusionSetting) -> list[np.ndarray]:
        """Of as much of each ranking as `Retrieval` fuses."""
        fused = []
        for rankings in zip(*(self._ranked[member] for member in setting.members), strict=True):
            pairs = [[(int(block), 0) for block in blocks[:RANKED_BLOCKS]] for blocks in rankings]
            fused.append(np.array([block for block, _ in reciprocal_rank_fusion(pairs, setting.constant)], np.int64))
        return fused


class _PlaceSearch:
    """One place, for every setting."""

    def __init__(self, retrieval: Retrieval, spaces: Mapping[bool, KeySpace], grid: Sequence[SearchSetting]) -> None:
        self._retrieval = retrieval
        most = max((setting.query_tokens for setting in grid if isinstance(setting, DenseSetting)), default=0)
        if most:
            self._states = retrieval.asking_states(most)
            reader, first = retrieval.reading.reader, retrieval.reading.history.first_block
            self._indexes = {
                own_metric: KeyIndex(reader, space, first, retrieval.shown_from, array=KEYS)
                for own_metric, space in spaces.items()
            }

    def ranked(self, setting: SearchSetting) -> RankedBlocks:
        """Blocks by a setting, all that it finds."""
        if isinstance(setting, DenseSetting):
            by_key = replace(self._retrieval, key_index=self._indexes[setting.own_metric])
            return by_key.dense_by(self._states[-setting.query_tokens :], setting.match)
        configured = replace(self._retrieval, config=replace(self._retrieval.config, **setting.keys))
        return configured.bm25() if isinstance(setting, Bm25Setting) else configured.minilm()


def _rows(scores: Sequence[PickScore]) -> np.ndarray:
    return np.array([[getattr(score, metric) for metric in METRICS] for score in scores])
