"""What a run may go on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.training.recipe import RECIPE, recipe_of, require_same_recipe
from cluster.errors import ConfigError
from cluster.training_config import ObjectiveConfig, TrainGistNetJob


def test_a_run_begun_before_a_switch_goes_on_with_its_default(tmp_path: Path) -> None:
    recipe = recipe_of(TrainGistNetJob(), {"text": "abc"})
    older = {key: value for key, value in recipe.items() if "states_" not in key and "scored_" not in key}
    assert len(older) < len(recipe)
    (tmp_path / RECIPE).write_text(json.dumps(older))
    require_same_recipe(tmp_path, recipe)
    other = recipe_of(TrainGistNetJob(objective=ObjectiveConfig(scored_share=0.5)), {"text": "abc"})
    with pytest.raises(ConfigError, match=r"objective\.scored_share: 1\.0 then, 0\.5 now"):
        require_same_recipe(tmp_path, other)
