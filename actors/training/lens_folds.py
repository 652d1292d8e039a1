"""A LensNet trained several times, each time without some documents, so that every one is scored by a net that has not
seen it; and with something left out, to see what that was worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import ray

from actors.training.lens_data import MeasuredSet
from actors.training.lens_metrics import Ranked, rank_sets
from actors.training.lens_trainer import LensTrainer, LensTrainerSpec
from cluster.ray_calls import check_resources, get_or_raise
from models.lensnet.net import LensNet

TRAINING_TIMEOUT_S = 3600.0
"""One small net."""

EVERYTHING = "nothing"
"""Left out of the net that others are compared with."""


def document_folds(sets: Sequence[MeasuredSet], num_folds: int, seed: int) -> list[list[MeasuredSet]]:
    """Sets by fold; all of a document are in one."""
    documents = sorted({found.uri for found in sets})
    np.random.default_rng(seed).shuffle(documents)
    fold_of = {uri: number % num_folds for number, uri in enumerate(documents)}
    return [[found for found in sets if fold_of[found.uri] == fold] for fold in range(num_folds)]


def without_each(spec: LensTrainerSpec) -> dict[str, LensTrainerSpec]:
    """Specs by what they leave out: nothing, each feature, the keys, attention among candidates."""
    variants = {EVERYTHING: spec}
    for name in spec.net.features:
        rest = tuple(other for other in spec.net.features if other != name)
        variants[name] = replace(spec, net=replace(spec.net, features=rest))
    if spec.net.key_dim:
        variants["keys"] = replace(spec, net=replace(spec.net, key_dim=0))
    if spec.net.num_layers:
        variants["attention"] = replace(spec, net=replace(spec.net, num_layers=0))
    return variants


@dataclass(frozen=True, eq=False)
class FoldedRanks:
    """Orders of nets that had not seen the documents, all folds one after the other."""

    ordered: Ranked
    """Every block in the order of its score."""
    above_zero: Ranked
    """Those whose score is above 0."""
    documents: tuple[str, ...]


def ranks_by_fold(
    variants: Mapping[str, LensTrainerSpec],
    folds: Sequence[Sequence[MeasuredSet]],
    usable: Callable[[Sequence[MeasuredSet]], list[MeasuredSet]],
    on_trained: Callable[[], None] = lambda: None,
) -> dict[str, FoldedRanks]:
    """Train every variant without each fold, and order the sets of that fold; as many at a time as there are CPUs.

    Args:
        variants: by name.
        folds: of `document_folds`; the ones with nothing to order are trained on only.
        usable: sets that can be ordered.
        on_trained: called after each net.

    Raises:
        ResourceError: the cluster cannot hold one training.
        ModelError: a loss that is no longer finite.
    """
    check_resources([{"CPU": 1.0}], "training LensNet")
    kept = [ray.put([s for other in folds if other is not fold for s in other]) for fold in folds]
    held_out = [usable(fold) for fold in folds]
    remote: Any = ray.remote(num_cpus=1)(_train)
    waiting = {
        remote.remote(spec, kept[number]): (name, number)
        for name, spec in variants.items()
        for number in range(len(folds))
        if held_out[number]
    }
    parts: dict[str, dict[int, tuple[Ranked, Ranked]]] = {name: {} for name in variants}
    for reference, (name, number) in _as_they_come(waiting):
        net: LensNet = get_or_raise(reference, TRAINING_TIMEOUT_S, "training LensNet")
        parts[name][number] = _ranked(net, held_out[number])
        on_trained()
    documents = tuple(found.uri for fold in held_out for found in fold)
    folded = {}
    for name, found in parts.items():
        ordered, above_zero = ([found[number][i] for number in sorted(found)] for i in (0, 1))
        folded[name] = FoldedRanks(_joined(ordered), _joined(above_zero), documents)
    return folded


def _train(spec: LensTrainerSpec, sets: list[MeasuredSet]) -> LensNet:
    trainer = LensTrainer(spec, sets)
    for _ in range(spec.config.num_epochs):
        trainer.epoch()
    return trainer.trained()


def _as_they_come(waiting: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    left = list(waiting)
    while left:
        (done, *_), left = ray.wait(left, num_returns=1)
        yield done, waiting[done]


def _ranked(net: LensNet, sets: Sequence[MeasuredSet]) -> tuple[Ranked, Ranked]:
    def scores(found: MeasuredSet) -> np.ndarray:
        return net.scores(found.candidates)

    return rank_sets(sets, scores), rank_sets(sets, scores, above=0.0)


def _joined(parts: Sequence[Ranked]) -> Ranked:
    gains = {k: np.concatenate([part.gains[k] for part in parts]) for k in parts[0].gains}
    return Ranked(
        MappingProxyType(gains),
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("hits", "correlations", "agreements")),
    )
