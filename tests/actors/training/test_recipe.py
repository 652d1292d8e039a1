"""What a run may go on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.training.recipe import RECIPE, recipe_of, require_same_recipe
from cluster.errors import ConfigError
from cluster.training_config import AdapterConfig, ObjectiveConfig, TrainGistNetJob, TrainingConfig

NEWER = ("states_", "scored_", "inner_", "base_width", "adapter.")


def test_a_run_begun_before_a_switch_goes_on_as_it_was(tmp_path: Path) -> None:
    recipe = recipe_of(TrainGistNetJob(training=TrainingConfig(base_width=0)), {"text": "abc"})
    older = {key: value for key, value in recipe.items() if not any(name in key for name in NEWER)}
    assert len(older) < len(recipe)
    (tmp_path / RECIPE).write_text(json.dumps(older))
    require_same_recipe(tmp_path, recipe)
    other = recipe_of(TrainGistNetJob(objective=ObjectiveConfig(scored_share=0.5)), {"text": "abc"})
    differs = r"objective\.scored_share: 1\.0 then, 0\.5 now; training\.base_width: 0 then, 256 now"
    with pytest.raises(ConfigError, match=differs):
        require_same_recipe(tmp_path, other)
    adapted = TrainGistNetJob(adapter=AdapterConfig(rank=4), training=TrainingConfig(base_width=0))
    with pytest.raises(ConfigError, match=r"\(adapter\.rank: 0 then, 4 now\)"):
        require_same_recipe(tmp_path, recipe_of(adapted, {"text": "abc"}))
