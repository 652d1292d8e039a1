"""A LensNet learns a rule that is in the labels, says it of documents it has not seen, and does so again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from actors.training.lens_data import MeasuredSet, batch_of, measured_sets
from actors.training.lens_metrics import rank_sets, usable
from actors.training.lens_trainer import LensTrainer, LensTrainerSpec
from cluster.errors import ModelError
from cluster.lens_training_config import LensNetConfig
from models.lensnet.net import LensNet, LensNetSpec
from tests.actors.training.lens_support import KEY_DIM, WORTH, labelled_context

CONFIG = LensNetConfig(num_epochs=25, contexts_per_step=16, learning_rate=0.003, hidden_dim=16, num_heads=2)
SPEC = LensTrainerSpec(LensNetSpec(key_dim=KEY_DIM, key_directions=2, hidden_dim=16, num_heads=2), CONFIG)


@pytest.fixture(scope="module")
def sets() -> list[MeasuredSet]:
    return measured_sets([labelled_context(number) for number in range(60)])


def trained(sets: list[MeasuredSet], num_epochs: int = CONFIG.num_epochs) -> tuple[LensNet, list[dict[str, float]]]:
    trainer = LensTrainer(SPEC, sets)
    losses = [line for _ in range(num_epochs) for line in trainer.epoch()]
    return trainer.trained(), losses


def test_it_learns_what_is_in_the_labels(sets: list[MeasuredSet]) -> None:
    net, losses = trained(sets)
    assert [line["step"] for line in losses] == list(range(1, len(losses) + 1))
    assert np.mean([line["loss"] for line in losses[-5:]]) < 0.7 * losses[0]["loss"]
    unseen = usable(measured_sets([labelled_context(number) for number in range(100, 130)]))
    ranked = rank_sets(unseen, lambda found: net.scores(found.candidates))
    assert ranked.agreements.mean() > 0.8
    scores = np.concatenate([net.scores(found.candidates) for found in unseen])
    told = np.concatenate([found.candidates.column("lexical_score") for found in unseen])
    slope = np.polyfit(WORTH * (told - 0.5), scores, 1)[0]
    assert 0.5 < slope < 1.5, "scores are nats a token, not just an order"


def test_the_same_labels_make_the_same_net(sets: list[MeasuredSet]) -> None:
    assert trained(sets, 2)[0].digest() == trained(sets, 2)[0].digest()


def test_a_loss_that_is_not_finite_ends_it(sets: list[MeasuredSet]) -> None:
    broken = sets[0]
    candidates = replace(broken.candidates, features=np.full_like(broken.candidates.features, np.inf))
    trainer = LensTrainer(SPEC, [MeasuredSet(broken.uri, candidates, broken.worth, ())])
    with pytest.raises(ModelError, match="no longer finite"):
        trainer.epoch()


def test_what_is_worth_more_than_a_net_can_say_counts_as_that(sets: list[MeasuredSet]) -> None:
    found = sets[0]
    huge = MeasuredSet(found.uri, found.candidates, 100 * np.sign(found.worth), ((np.ones(len(found.worth)), -100.0),))
    batch = batch_of([huge], 0.5)
    assert batch.worth.abs().max() == 0.5
    assert batch.edit_gain.tolist() == [-0.5]
    assert batch_of([huge]).worth.abs().max() == 100
