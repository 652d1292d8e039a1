"""Figures in one house style, drawn without a display.

matplotlib is imported where it is used, because that takes a third of a second; pyplot is not used at all,
because its global state keeps every figure alive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STYLE: dict[Any, Any] = {
    "figure.dpi": 120,
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "axes.prop_cycle": "cycler('color', ['#2b6cb0', '#c05621', '#2f855a', '#6b46c1', '#b83280', '#4a5568'])",
}


@contextmanager
def figure(
    path: Path, title: str = "", *, num_columns: int = 1, size: tuple[float, float] = (7.0, 4.0)
) -> Iterator[Any]:
    """Draw on the axes this yields; they are saved as `path` when the block ends without an error.

    Args:
        path: a `.png` file; in a run's folder it becomes part of the report and of MLflow's artefacts.
        title: of the whole figure.
        num_columns: plots side by side. 1 yields one `matplotlib.axes.Axes`, more an array of shape (num_columns,).
        size: width and height in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        fig = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(fig)
        yield fig.subplots(1, num_columns)
        if title:
            fig.suptitle(title, x=0.01, ha="left", weight="bold")
        fig.savefig(path, format="png")
