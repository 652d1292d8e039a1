"""Folds keep documents together, and every set is ordered by a net that has not seen its document."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from actors.training.lens_data import MeasuredSet, measured_sets
from actors.training.lens_folds import EVERYTHING, document_folds, ranks_by_fold, without_each
from actors.training.lens_metrics import usable
from actors.training.lens_trainer import LensTrainerSpec
from cluster.lens_training_config import LensNetConfig
from cluster.ray_runtime import RaySession
from models.lensnet.net import LensNetSpec
from tests.actors.training.lens_support import KEY_DIM, labelled_context

CONFIG = LensNetConfig(num_epochs=25, contexts_per_step=16, learning_rate=0.003, hidden_dim=16, num_heads=2)
SPEC = LensTrainerSpec(LensNetSpec(key_dim=KEY_DIM, key_directions=2, hidden_dim=16, num_heads=2), CONFIG)


@pytest.fixture(scope="module")
def sets() -> list[MeasuredSet]:
    return measured_sets([labelled_context(number) for number in range(60)])


def test_folds_are_of_documents_and_hold_every_set_once(sets: list[MeasuredSet]) -> None:
    folds = document_folds(sets, 3, seed=1)
    assert sum(map(len, folds)) == len(sets)
    documents = [{found.uri for found in fold} for fold in folds]
    assert not documents[0] & documents[1]
    assert not documents[1] & documents[2]
    again = document_folds(sets[::-1], 3, seed=1)
    assert [{found.uri for found in fold} for fold in again] == documents


def test_variants_leave_one_thing_out() -> None:
    variants = without_each(SPEC)
    assert variants[EVERYTHING] is SPEC
    assert "same_document" not in variants["same_document"].net.features
    assert len(variants["same_document"].net.features) == len(SPEC.net.features) - 1
    assert variants["keys"].net.key_dim == 0
    assert variants["attention"].net.num_layers == 0
    bare = LensTrainerSpec(dataclasses.replace(SPEC.net, key_dim=0, num_layers=0), CONFIG)
    assert not {"keys", "attention"} & without_each(bare).keys()


def test_nets_order_what_they_have_not_seen_by_the_rule_they_learned(
    sets: list[MeasuredSet], ray_cluster: RaySession
) -> None:
    del ray_cluster
    folds = document_folds(sets, 3, seed=0)
    trained: list[int] = []
    folded = ranks_by_fold({EVERYTHING: SPEC}, folds, usable, lambda: trained.append(1))[EVERYTHING]
    assert len(trained) == 3
    ordered = [found for fold in folds for found in usable(fold)]
    assert folded.documents == tuple(found.uri for found in ordered)
    assert np.mean(folded.ordered.correlations) > 0.5
    assert np.mean(folded.above_zero.gains[1]) > 0.5 * np.mean(
        [s.worth[s.measured].mean(axis=1).max() for s in ordered]
    )
