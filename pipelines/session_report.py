"""A session to look at: what its Working Contexts showed over time, as numbers, a picture and a page.

Made from the session's focus events, so that any session of a context can be drawn again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from actors.session_turn import Turn
from cluster import metric_names as names
from cluster.plots import figure
from cluster.tables import Table
from models.focus.history import blocks_per_node

Event = Mapping[str, Any]
"""A row of `storage.focus.events.SCHEMA`."""

COLUMNS = 720
"""Of the timeline in pictures."""

LEVEL_COLOURS = ("#1a365d", "#4a90c2", "#a9cce3", "#e5edf3")
"""LOD0, LOD1, LOD2, and above."""

PICTURE, PAGE = "focus.png", "focus.html"


def swap_rate(event: Event) -> float:
    """Share of the raw blocks, now and before, that a refocus changed by choice."""
    raw = sum(entry["lod"] == 0 for entry in event["entries"])
    return (len(event["added"]) + len(event["dropped"])) / max(1, raw + len(event["dropped"]))


def residencies(events: Sequence[Event]) -> list[int]:
    """Refocuses that each found block stayed, for those that were given up within the session."""
    since: dict[tuple[int, int], int] = {}
    stayed = []
    for event in events:
        for block in event["added"]:
            since[(block["source"], block["block"])] = event["number"]
        for block in event["dropped"]:
            began = since.pop((block["source"], block["block"]), None)
            if began is not None:
                stayed.append(event["number"] - began)
    return stayed


def session_numbers(turns: Sequence[Turn], events: Sequence[Event]) -> dict[str, Any]:
    """The machine-readable report."""
    reused, read = (sum(int(event[name]) for event in events) for name in ("rows_reused", "rows_read"))
    stayed = residencies(events)
    later = [swap_rate(event) for event in events if event["number"] > 0]
    decoded = sum(int(event["num_decoded"]) for event in events)
    nll = sum(event["nll_decoded"] * event["num_decoded"] for event in events if event["num_decoded"])
    seconds: dict[str, float] = {}
    for turn in turns:
        for part, value in turn.seconds.items():
            seconds[part] = seconds.get(part, 0.0) + value
    return {
        "turns": len(turns),
        "answer_tokens": sum(turn.num_answer_tokens for turn in turns),
        "refocuses": len(events),
        names.ROWS_REUSED_SHARE: reused / max(1, reused + read),
        names.ROWS_READ_TOTAL: read,
        names.SWAP_RATE: float(np.mean(later)) if later else None,
        names.RESIDENCY: float(np.mean(stayed)) if stayed else None,
        "nll_decoded": nll / decoded if decoded else None,
        "seconds_by_part": seconds,
        names.FIRST_TOKEN_SECONDS: [turn.first_token_s for turn in turns],
        names.CONTEXT_TOKENS: events[-1]["num_tokens"] if events else 0,
    }


def session_tables(turns: Sequence[Turn], events: Sequence[Event]) -> list[Table]:
    """For people."""
    numbers = session_numbers(turns, events)
    rows: list[dict[str, Any]] = [
        {"what": "turns / tokens answered", "value": f"{numbers['turns']} / {numbers['answer_tokens']:,}"},
        {"what": "tokens remembered", "value": f"{numbers[names.CONTEXT_TOKENS]:,}"},
        {"what": "refocuses", "value": numbers["refocuses"]},
        {"what": "rows of the KV cache reused by refocuses", "value": f"{numbers[names.ROWS_REUSED_SHARE]:.0%}"},
        {"what": "swap rate, mean of refocuses", "value": numbers[names.SWAP_RATE]},
        {"what": "residency of found blocks that went, refocuses", "value": numbers[names.RESIDENCY]},
    ]
    total = sum(numbers["seconds_by_part"].values()) or 1.0
    parts = [
        {"part": part, "seconds": value, "share": f"{value / total:.1%}"}
        for part, value in sorted(numbers["seconds_by_part"].items(), key=lambda pair: -pair[1])
    ]
    return [Table(rows, "Session"), Table(parts, "Where the time went")] if parts else [Table(rows, "Session")]


class Strip:
    """Refocuses by timeline: the finest level that shows each column.

    Rows whose timelines are not one (places of an evaluation) are moved by `shift` blocks each.
    """

    def __init__(self, events: Sequence[Event], columns: int = COLUMNS, shifts: Sequence[int] | None = None) -> None:
        self.contexts = [context["context"] for context in events[-1]["contexts"]]
        self.columns = columns
        self._shifts = [0] * len(events) if shifts is None else list(shifts)
        sizes = [
            max(
                (
                    _stop(entry) + shift
                    for event, shift in zip(events, self._shifts, strict=True)
                    for entry in event["entries"]
                    if entry["source"] == source
                ),
                default=1,
            )
            for source in range(len(self.contexts))
        ]
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        self.levels = np.full((len(events), columns), -1, np.int8)
        for row, event in enumerate(events):
            for entry in sorted(event["entries"], key=lambda e: -e["lod"]):
                first = self.column(row, entry["source"], _start(entry))
                stop = max(first + 1, self.column(row, entry["source"], _stop(entry)))
                self.levels[row, max(first, 0) : stop] = min(entry["lod"], len(LEVEL_COLOURS) - 1)

    def column(self, row: int, source: int, block: int) -> int:
        """Of a block."""
        return int((self.starts[source] + block + self._shifts[row]) * self.columns // self.starts[-1])


def _start(entry: Mapping[str, int]) -> int:
    return entry["index"] * blocks_per_node(entry["lod"])


def _stop(entry: Mapping[str, int]) -> int:
    return (entry["index"] + 1) * blocks_per_node(entry["lod"])


def draw_session(events: Sequence[Event], folder: Path) -> None:
    """`focus.png` and `focus.html`, which needs no network."""
    strip = Strip(events)
    _picture(events, strip, folder / PICTURE, f"block ({', '.join(strip.contexts)})", "refocus")
    _page(events, strip, folder / PAGE)


def draw_places(events: Sequence[Event], shifts: Sequence[int], folder: Path) -> None:
    """The same of places of an evaluation, a row each, moved by so many blocks that all of them end at the right."""
    strip = Strip(events, shifts=shifts)
    _picture(events, strip, folder / PICTURE, "blocks of the history, the newest at the right", "place")
    _page(events, strip, folder / PAGE)


def _picture(events: Sequence[Event], strip: Strip, path: Path, across: str, down: str) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    height = min(9.0, 2.2 + 0.14 * len(events))
    with figure(path, "What the Working Context showed", size=(9.5, height)) as axes:
        colours = ListedColormap(["#ffffff", *LEVEL_COLOURS])
        axes.imshow(
            strip.levels + 1, cmap=colours, vmin=0, vmax=len(LEVEL_COLOURS), aspect="auto", interpolation="none"
        )
        for name, marker, colour in (("added", "v", "#2f855a"), ("dropped", "x", "#c05621")):
            places = [
                (strip.column(row, block["source"], block["block"]), row)
                for row, event in enumerate(events)
                for block in event[name]
            ]
            if places:
                axes.scatter(*zip(*places, strict=True), marker=marker, color=colour, s=18, linewidths=1)
        for start in strip.starts[1:-1]:
            axes.axvline(start * strip.columns / strip.starts[-1], color="#c05621", linewidth=0.8)
        ticks = np.linspace(0, strip.columns - 1, 7)
        axes.set_xticks(ticks, [f"{tick / strip.columns * strip.starts[-1]:,.0f}" for tick in ticks])
        axes.set(xlabel=across, ylabel=down)
        axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(False)
        labels = ("raw", "LOD1", "LOD2", "above")
        handles: list[Any] = [Patch(color=c, label=label) for c, label in zip(LEVEL_COLOURS, labels, strict=True)]
        handles += [
            Line2D([], [], marker=marker, color=colour, linestyle="", label=label)
            for label, marker, colour in (("shown by choice", "v", "#2f855a"), ("given up", "x", "#c05621"))
        ]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncol=6, fontsize=8)


def _page(events: Sequence[Event], strip: Strip, path: Path) -> None:
    rows = []
    for row, event in enumerate(events):
        scores = {(s["source"], s["block"]): s["score"] for s in event["scores"]}
        marks = [
            {
                "x": strip.column(row, block["source"], block["block"]),
                "kind": kind,
                "what": f"{strip.contexts[block['source']]}:{block['block']}",
                "score": round(float(scores.get((block["source"], block["block"]), 0.0)), 3),
            }
            for kind in ("found", "added", "dropped", "pinned")
            for block in event[kind]
        ]
        rows.append(
            {
                "levels": "".join("-" if level < 0 else str(level) for level in strip.levels[row].tolist()),
                "marks": marks,
                "title": f"refocus {event['number']} ({event['reason']}): {event['num_tokens']:,} tokens in "
                f"{event['cost']} of {event['budget']} rows, {event['rows_reused']} reused, {event['rows_read']} read"
                + (
                    f", NLL {event['nll_decoded']:.2f} of {event['num_decoded']} tokens" if event["num_decoded"] else ""
                ),
            }
        )
    data = {"rows": rows, "columns": strip.columns, "colours": LEVEL_COLOURS}
    # In a script element only this could end it.
    text = json.dumps(data).replace("</", "<\\/")
    path.write_text(_PAGE.replace("DATA", text), "utf-8")


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>What the Working Context showed</title>
<style>
body { font: 14px system-ui, sans-serif; margin: 24px; color: #1a202c }
.key span { display: inline-block; width: 12px; height: 12px; margin: 0 4px 0 14px; border: 1px solid #cbd5e0 }
#say { min-height: 3em; white-space: pre-line; color: #2d3748 }
canvas { width: 100%; max-width: 1400px; image-rendering: pixelated; border: 1px solid #cbd5e0 }
</style>
<h2>What the Working Context showed</h2>
<p class="key" id="key"></p>
<p>One row a refocus, the oldest at the top; from left to right the timeline. Green: shown by choice. Orange: given up.
Move over a row.</p>
<div id="say"></div>
<canvas id="strip"></canvas>
<script>
const data = DATA
const size = 12, canvas = document.getElementById('strip'), pen = canvas.getContext('2d')
canvas.width = data.columns * 2
canvas.height = data.rows.length * size
const names = ['raw', 'LOD1', 'LOD2', 'above']
document.getElementById('key').innerHTML =
  names.map((name, i) => `<span style="background:${data.colours[i]}"></span>${name}`).join('')
data.rows.forEach((row, y) => {
  [...row.levels].forEach((level, x) => {
    pen.fillStyle = level === '-' ? '#ffffff' : data.colours[+level]
    pen.fillRect(2 * x, y * size, 2, size - 1)
  })
  row.marks.forEach(mark => {
    if (mark.kind === 'found') return
    pen.fillStyle = { added: '#38a169', dropped: '#dd6b20', pinned: '#805ad5' }[mark.kind]
    pen.fillRect(2 * mark.x - 2, y * size + (mark.kind === 'dropped' ? size - 5 : 0), 6, 4)
  })
})
canvas.onmousemove = event => {
  const box = canvas.getBoundingClientRect()
  const row = data.rows[Math.floor((event.clientY - box.top) / box.height * data.rows.length)]
  if (!row) return
  const list = kind => row.marks.filter(m => m.kind === kind).map(m => `${m.what} (${m.score})`).join(', ')
  const lines = [row.title]
  for (const kind of ['found', 'added', 'dropped', 'pinned']) if (list(kind)) lines.push(`${kind}: ${list(kind)}`)
  document.getElementById('say').textContent = lines.join('\\n')
}
</script>
</html>
"""
