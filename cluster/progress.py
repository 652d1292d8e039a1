"""Progress of long work: a bar on a terminal, off it a plain line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from cluster.log import get_logger
from cluster.tables import format_value

_RATE_WINDOW_S = 60.0
"""The rate is that of the last minute, so that a slow start does not spoil the ETA for an hour."""

log = get_logger("progress")


class Progress:
    """Counts units of work and shows how far they are.

    On a terminal a bar; elsewhere one line every `interval_s`, also while nothing moves, so that a stalled job is
    seen to be one. The plain lines go into the run's log in both cases.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        label: str = "",
        *,
        initial: int = 0,
        interval_s: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        """Args:
        total: units of work, or None when nobody knows.
        unit: what they are, in the plural.
        label: what is being done.
        initial: units an earlier run had done; they count as done, not for the rate.
        interval_s: seconds between plain lines.
        stream: where to show it; None takes `sys.stderr` of that moment.
        """
        self.total = total
        self.unit = unit
        self.label = label or unit
        self.done = initial
        self._initial = initial
        self._interval_s = interval_s
        self._stream = stream or sys.stderr
        self._extra: dict[str, object] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: RichProgress | None = None
        self._started = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque([(self._started, initial)])

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        self._marks = deque([(self._started, self.done)])
        if self._stream.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[extra]}"),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, rate="", extra="")
            self._bar.start()
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)
        self._thread.start()
        return self

    def advance(self, num_units: int = 1, **extra: object) -> None:
        """Count `num_units` as done; `extra` is shown behind the numbers until it changes."""
        with self._lock:
            self.done += num_units
            self._extra.update(extra)
            self._mark()
            if self._bar is not None:
                self._bar.update(self._task, completed=self.done, rate=self._rate_text(), extra=self._extra_text())

    def grow(self, num_units: int) -> None:
        """Add to the total: more work was found."""
        self.set_total((self.total or 0) + num_units)

    def set_total(self, total: int | None) -> None:
        """Correct the total, or say that nobody knows it."""
        with self._lock:
            self.total = total
            if self._bar is not None:
                self._bar.update(self._task, total=total)

    @property
    def rate_per_s(self) -> float:
        """Units per second over the last minute."""
        (since, count), now = self._marks[0], time.monotonic()
        return (self.done - count) / max(now - since, 1e-9)

    def line(self) -> str:
        """The state in one line: `label: done of total unit (percent), rate, ETA, extras`."""
        of_total = f" of {self.total:,}" if self.total is not None else ""
        percent = f" ({100 * self.done / self.total:.1f}%)" if self.total else ""
        parts = [f"{self.label}: {self.done:,}{of_total} {self.unit}{percent}", self._rate_text()]
        rate = self.rate_per_s
        if self.total is not None and self.done < self.total:
            parts.append(f"ETA {_clock((self.total - self.done) / rate)}" if rate > 0 else "ETA unknown")
        if extra := self._extra_text():
            parts.append(extra)
        return ", ".join(parts)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        elapsed_s = time.monotonic() - self._started
        average = (self.done - self._initial) / max(elapsed_s, 1e-9)
        ending = "done" if kind is None else "stopped"
        speed = f"{format_value(average)} {self.unit}/s"
        last = f"{self.label}: {ending}, {self.done:,} {self.unit} in {_clock(elapsed_s)}, {speed}"
        if self._bar is not None:
            self._bar.stop()
        else:
            print(last, file=self._stream, flush=True)
        log.debug(last)

    def _report(self) -> None:
        while not self._stop.wait(self._interval_s):
            with self._lock:
                self._mark()
                text = self.line()
            if self._bar is None:
                print(text, file=self._stream, flush=True)
            log.debug(text)

    def _mark(self) -> None:
        now = time.monotonic()
        # A mark a second is enough, and keeps the window small however often `advance` is called.
        if now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[1][0] < now - _RATE_WINDOW_S:
            self._marks.popleft()

    def _rate_text(self) -> str:
        return f"{format_value(float(self.rate_per_s))} {self.unit}/s"

    def _extra_text(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self._extra.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
