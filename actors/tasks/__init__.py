"""Tasks: questions about a long history whose answers were planted in it, made by seed, and their scoring.

`TASKS[name](**options)` is a task; its samples say what to plant (`planting`) and what to ask (`scoring`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NoReturn

from actors.tasks.aggregation import WordExtraction
from actors.tasks.ask_again import AskAgain
from actors.tasks.facts import SupportingFacts
from actors.tasks.planting import Planted, choose_places, is_plantable, plant, plantable_super_blocks
from actors.tasks.recall import KeyValueRecall
from actors.tasks.retrieval import VALUE_KINDS, NeedleRetrieval
from actors.tasks.sample import Needle, Task, TaskSample
from actors.tasks.scoring import choose_candidate, exact_match, infeasible, items_found, normalise
from actors.tasks.tracking import VariableTracking
from cluster.errors import ConfigError

__all__ = [
    "TASKS",
    "Needle",
    "Planted",
    "Task",
    "TaskSample",
    "choose_candidate",
    "choose_places",
    "exact_match",
    "infeasible",
    "is_plantable",
    "items_found",
    "normalise",
    "plant",
    "plantable_super_blocks",
]


class _Registry(dict[str, Callable[..., Task]]):
    """A name that is not there fails with those that are."""

    def __missing__(self, name: str) -> NoReturn:
        raise ConfigError(f"there is no task {name!r}; use one of {', '.join(self)}")


_RETRIEVAL = {
    "single": {"num_needed": 1, "num_distractors": 0},
    "multi_key": {"num_needed": 1, "num_distractors": 7},
    "multi_value": {"num_needed": 3, "num_distractors": 4, "one_key": True},
    "multi_query": {"num_needed": 2, "num_distractors": 5},
}

TASKS: dict[str, Callable[..., Task]] = _Registry(
    {
        f"{kind}_{values}": partial(NeedleRetrieval, f"{kind}_{values}", values=values, **options)
        for kind, options in _RETRIEVAL.items()
        for values in VALUE_KINDS
    }
    | {
        "variable_tracking": VariableTracking,
        "common_words": partial(WordExtraction, "common_words", zipf=False),
        "frequent_words": partial(WordExtraction, "frequent_words", zipf=True),
        "one_fact": partial(SupportingFacts, "one_fact", num_facts=1),
        "two_facts": partial(SupportingFacts, "two_facts", num_facts=2),
        "three_facts": partial(SupportingFacts, "three_facts", num_facts=3),
        "recall_literal": partial(KeyValueRecall, "recall_literal", paraphrased=False),
        "recall_paraphrased": partial(KeyValueRecall, "recall_paraphrased", paraphrased=True),
        "ask_again": AskAgain,
    }
)
"""Tasks by name. Any option of a task can be given: `TASKS["three_facts"](num_events=20)`.

Raises:
    ConfigError: an unknown name, listing the known ones.
"""
