"""Settings a searcher can have, as the rows of a grid: what they are called, and the configuration they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, ClassVar

from actors.evaluation.rivals import BM25, DENSE, FUSION, MINILM
from cluster.evaluation_config import RetrievalConfig
from cluster.tuning_config import Match, RetrievalTuningConfig

DEFAULTS = RetrievalConfig()


@dataclass(frozen=True)
class Bm25Setting:
    """BM25's constants and its query."""

    searcher: ClassVar[str] = BM25

    query_tokens: int = DEFAULTS.bm25_query_tokens
    k1: float = DEFAULTS.bm25_k1
    b: float = DEFAULTS.bm25_b

    @property
    def columns(self) -> dict[str, Any]:
        """As in tables."""
        return {"query tokens": self.query_tokens, "k1": self.k1, "b": self.b}

    @property
    def curve(self) -> str:
        """What settings have in common that differ in query tokens."""
        return f"k1 {self.k1:g}, b {self.b:g}"

    @property
    def keys(self) -> dict[str, Any]:
        """Keys of `RetrievalConfig` that set it."""
        return {"bm25_k1": self.k1, "bm25_b": self.b, "bm25_query_tokens": self.query_tokens}


@dataclass(frozen=True)
class DenseSetting:
    """Routing keys: the query and how it is compared."""

    searcher: ClassVar[str] = DENSE

    query_tokens: int = DEFAULTS.dense_query_tokens
    match: Match = "pooled"
    own_metric: bool = True
    """In the metric of the net that made the keys, as is searched; otherwise merely centred."""

    @property
    def columns(self) -> dict[str, Any]:
        """As in tables."""
        return {"query tokens": self.query_tokens, "match": self.match, "net's own metric": self.own_metric}

    @property
    def curve(self) -> str:
        """What settings have in common that differ in query tokens."""
        return f"{self.match}, {'own metric' if self.own_metric else 'centred'}"

    @property
    def keys(self) -> dict[str, Any] | None:
        """Keys of `RetrievalConfig` that set it; None where none do."""
        as_searched = self.match == "pooled" and self.own_metric
        return {"dense_query_tokens": self.query_tokens} if as_searched else None


@dataclass(frozen=True)
class MinilmSetting:
    """Sentence embeddings: the query."""

    searcher: ClassVar[str] = MINILM

    query_tokens: int = DEFAULTS.minilm_query_tokens

    @property
    def columns(self) -> dict[str, Any]:
        """As in tables."""
        return {"query tokens": self.query_tokens}

    @property
    def curve(self) -> str:
        """What settings have in common that differ in query tokens."""
        return "all-MiniLM-L6-v2"

    @property
    def keys(self) -> dict[str, Any]:
        """Keys of `RetrievalConfig` that set it."""
        return {"minilm_query_tokens": self.query_tokens}


SearchSetting = Bm25Setting | DenseSetting | MinilmSetting


@dataclass(frozen=True)
class FusionSetting:
    """Which rankings are fused, and how."""

    searcher: ClassVar[str] = FUSION

    members: tuple[SearchSetting, ...]
    constant: float = DEFAULTS.fusion_constant

    @property
    def columns(self) -> dict[str, Any]:
        """As in tables."""
        return {"of": self.name, "constant": self.constant}

    @property
    def name(self) -> str:
        """What is fused. Defaults are told apart where members are all that, because the others were chosen."""
        names = " + ".join(member.searcher for member in self.members)
        return f"{names} as by default" if self.members == default_fusion().members else names

    @property
    def keys(self) -> dict[str, Any]:
        """Keys of `RetrievalConfig` that set it, its members' apart."""
        return {"fusion": [member.searcher for member in self.members], "fusion_constant": self.constant}


Setting = SearchSetting | FusionSetting

_SEARCH_DEFAULTS: dict[str, SearchSetting] = {BM25: Bm25Setting(), DENSE: DenseSetting(), MINILM: MinilmSetting()}


def default_fusion() -> FusionSetting:
    """What `RetrievalConfig` fuses."""
    return FusionSetting(tuple(_SEARCH_DEFAULTS[name] for name in DEFAULTS.fusion))


def default_of(searcher: str) -> Setting:
    """What `RetrievalConfig` sets for it."""
    return default_fusion() if searcher == FUSION else _SEARCH_DEFAULTS[searcher]


def search_grid(config: RetrievalTuningConfig) -> list[SearchSetting]:
    """Every setting of every searcher that is tuned, each once, and its default."""
    bm25 = [Bm25Setting(*values) for values in product(config.bm25_query_tokens, config.bm25_k1, config.bm25_b)]
    dense = [
        DenseSetting(*values)
        for values in product(config.dense_query_tokens, config.dense_match, config.dense_own_metric)
    ]
    minilm = [MinilmSetting(num_tokens) for num_tokens in config.minilm_query_tokens]
    grids: list[tuple[list[SearchSetting], SearchSetting]] = [
        ([*bm25], Bm25Setting()),
        ([*dense], DenseSetting()),
        ([*minilm], MinilmSetting()),
    ]
    return [setting for grid, default in grids if grid for setting in dict.fromkeys([*grid, default])]


def fusion_grid(best: Sequence[SearchSetting], constants: Sequence[float]) -> list[FusionSetting]:
    """Every two or more of the best settings, with every constant; and the default where its members were searched."""
    groups = [group for size in range(2, len(best) + 1) for group in combinations(best, size)]
    grid = [FusionSetting(group, float(constant)) for group in groups for constant in constants]
    searched = {setting.searcher for setting in best}
    if grid and searched.issuperset(DEFAULTS.fusion):
        grid.append(default_fusion())
    return list(dict.fromkeys(grid))
