"""What a run was begun with: going on with anything else would be another run under its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.provenance import flatten
from cluster.run import write_atomically
from cluster.training_config import AdapterConfig, ObjectiveConfig, TrainGistNetJob

RECIPE = "recipe.json"
BEGUN_NET = "untrained gistnet"
CONTEXT_VERSION = "context version"

FREE_KEYS = frozenset(
    f"training.{name}"
    for name in (
        "num_workers",
        "gpus_per_worker",
        "threads_per_worker",
        "windows_per_pass",
        "zero_stage",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "validate_every_steps",
        "max_failures",
        "export_dtype",
        "registered_name",
    )
)
"""How the work is shared out and looked at; what comes out does not depend on it, but for rounding."""


def recipe_of(job: TrainGistNetJob, digests: Mapping[str, str]) -> dict[str, Any]:
    """Everything the weights depend on, flat: the job's keys, and digests of model, tokenizer, net and text."""
    sections = {name: asdict(getattr(job, name)) for name in ("objective", "adapter", "training")}
    sections["windows"] = {"window_tokens": job.windows.window_tokens}
    sections["base_lm"] = {"dtype": job.base_lm.dtype}
    kept = {key: value for key, value in flatten(sections).items() if key not in FREE_KEYS}
    return {**kept, **{f"digest of {name}": digest for name, digest in digests.items()}}


def require_same_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write a run's recipe down, or compare it with the one it was begun with.

    Raises:
        ConfigError: naming what differs.
    """
    path = folder / RECIPE
    if not path.exists():
        write_atomically(path, json.dumps(recipe, indent=2))
        return
    begun = json.loads(path.read_text())
    # Runs that were begun before there was a switch ran as it does with this.
    switches = {"objective": asdict(ObjectiveConfig()), "adapter": asdict(AdapterConfig())}
    before = {**flatten(switches), "training.base_width": 0}
    begun |= {key: before[key] for key in recipe.keys() & before.keys() - begun.keys()}
    differing = [key for key in {**begun, **recipe} if begun.get(key) != recipe.get(key)]
    if differing:
        listed = "; ".join(f"{key}: {begun.get(key)!r} then, {recipe.get(key)!r} now" for key in sorted(differing))
        hint = ""
        if f"digest of {BEGUN_NET}" in differing:
            hint = "; if gistnet.path is models:/.../latest or an alias, give the version that the run was begun with"
        raise ConfigError(f"the run in {folder} was begun otherwise ({listed}); give this one another --run.name{hint}")


def begun_with(folder: Path, key: str) -> Any:
    """A value of the recipe that a run was begun with; None where it was not."""
    path = folder / RECIPE
    return json.loads(path.read_text()).get(key) if path.exists() else None
