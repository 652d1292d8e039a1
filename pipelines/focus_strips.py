"""What Working Contexts of an evaluation showed, a row a place: a session's strip chart of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.evaluation import rivals
from actors.evaluation.results import FocusResults
from actors.evaluation.rivals import Condition
from cluster.evaluation_config import FocusEvaluationConfig
from models.focus.history import History
from pipelines.session_report import Event, draw_places
from storage.contract import TreeReader

MOST_PLACES = 60
"""Rows of a picture: the first of the timeline."""

PREFERRED = (rivals.LENSNET, rivals.ORACLE, rivals.FUSION)
"""Whose choices are drawn, where they were measured in a form with gists."""


def drawn_condition(conditions: Sequence[Condition]) -> Condition | None:
    """The condition whose Working Contexts are drawn; None where none has gists."""
    with_gists = [c for c in conditions if c.form in {"overlay", "strict"}]
    for chooser in PREFERRED:
        for condition in with_gists:
            if condition.chooser == chooser:
                return condition
    return with_gists[0] if with_gists else None


def draw_strips(
    results: FocusResults,
    folder: Path,
    condition: Condition,
    budget: int,
    config: FocusEvaluationConfig,
    reader: TreeReader,
    vectors_per_node: int,
) -> None:
    """`focus.png` and `focus.html`, in the order of the timeline.

    Args:
        results: of the evaluation.
        folder: of the run.
        condition: one with gists, of `drawn_condition`.
        budget: one of the evaluation's.
        config: the evaluation's.
        reader: of the context, at the version that was evaluated.
        vectors_per_node: of the tree.
    """
    measured = results.column(condition.name, budget)
    order = sorted(range(len(measured)), key=lambda i: (results.samples[i][0].stop_block, i))[:MOST_PLACES]
    events: list[Event] = []
    stops = [results.samples[i][0].stop_block for i in order]
    longest = max(results.samples[i][0].stop_block - results.samples[i][0].first_block for i in order)
    before: set[int] = set()
    for number, i in enumerate(order):
        place, found = results.samples[i][0], measured[i]
        history = History.of(reader, place.first_block, place.stop_block, vectors_per_node=vectors_per_node)
        ranked = [(block, 0) for block in found.picked]
        wc = rivals.working_context(condition, history, ranked, budget, config.tail_tokens, len(ranked))
        picked = set(found.picked)
        entries = [{"lod": node.lod, "index": node.index, "source": 0} for node in wc.nodes()]
        events.append(
            {
                "number": number,
                "reason": place.uri,
                "contexts": [{"context": reader.version.context}],
                "entries": entries,
                "found": _names(picked),
                "pinned": [],
                "added": _names(picked - before),
                "dropped": _names({b for b in before - picked if place.first_block <= b < place.stop_block}),
                "scores": [],
                "num_tokens": history.num_tokens,
                "cost": wc.total_cost,
                "budget": budget,
                "rows_reused": 0,
                "rows_read": wc.total_cost,
                "num_decoded": config.horizon_tokens - 1,
                "nll_decoded": found.nll,
            }
        )
        before = picked
    draw_places(events, [longest - stop for stop in stops], folder)


def _names(blocks: set[int]) -> list[dict[str, Any]]:
    return [{"block": block, "source": 0} for block in sorted(blocks)]
