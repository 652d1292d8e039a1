"""Logging: short lines on the terminal, everything in the run's `job.log`.

Loggers are named `megacontext.<part>`. Libraries are heard from warnings on, in the file.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

ROOT = "megacontext"
_FILE_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(process)d: %(message)s"
# These set a level of their own, or print at INFO what is of no use to who runs a job.
_NOISY = ("alembic", "mlflow", "ray", "urllib3", "filelock", "matplotlib", "git", "fsspec", "asyncio", "httpx")


def get_logger(part: str) -> logging.Logger:
    """The logger of one part of the program, for example `get_logger("compact")`."""
    return logging.getLogger(f"{ROOT}.{part}")


class _TerminalHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what `sys.stderr` is at that moment, so that lines appear above a progress bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.INFO)
        self.setFormatter(_ShortFormatter())

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _ShortFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


@contextmanager
def logging_to(file: Path) -> Iterator[None]:
    """Log to the terminal (INFO, short) and to the end of `file` (everything, with times), then stop doing so.

    Within another one a line stands in both files and once on the terminal.
    """
    quiet_libraries()
    ours, everything = logging.getLogger(ROOT), logging.getLogger()
    level = ours.level
    terminal = _TerminalHandler()
    full = logging.FileHandler(file, encoding="utf-8")
    full.setFormatter(logging.Formatter(_FILE_FORMAT, "%Y-%m-%dT%H:%M:%S"))
    ours.setLevel(logging.DEBUG)
    if not any(isinstance(handler, _TerminalHandler) for handler in ours.handlers):
        ours.addHandler(terminal)
    everything.addHandler(full)
    try:
        yield
    finally:
        ours.removeHandler(terminal)
        everything.removeHandler(full)
        full.close()
        ours.setLevel(level)


def quiet_libraries() -> None:
    """Let libraries speak from warnings on."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
