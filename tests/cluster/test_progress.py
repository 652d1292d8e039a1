from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest

from cluster.log import logging_to
from cluster.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_off_a_terminal_a_plain_line_comes_every_interval(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logging_to(tmp_path / "job.log"), Progress(1000, "tokens", "compacting", interval_s=0.1, stream=stream) as bar:
        for _ in range(5):
            bar.advance(50, documents=3)
            time.sleep(0.06)
    *lines, last = stream.getvalue().splitlines()
    assert 2 <= len(lines) <= 5
    shape = r"compacting: \d+ of 1,000 tokens \(\d+\.\d%\), [\d,.]+ tokens/s, ETA 0:00:0\d, documents 3"
    assert all(re.fullmatch(shape, line) for line in lines), lines
    assert re.fullmatch(r"compacting: done, 250 tokens in 0:00:00, [\d,.]+ tokens/s", last)
    assert "\x1b" not in stream.getvalue()
    logged = [line.split(": ", 1)[1] for line in (tmp_path / "job.log").read_text().splitlines()]
    assert logged == [*lines, last]


def test_lines_keep_coming_while_nothing_moves() -> None:
    stream = io.StringIO()
    with Progress(10, "blocks", interval_s=0.05, stream=stream):
        time.sleep(0.3)
    assert stream.getvalue().count("blocks: 0 of 10 blocks (0.0%), 0 blocks/s, ETA unknown\n") >= 2


def test_the_total_may_be_unknown_and_grow() -> None:
    bar = Progress(None, "tokens", "reading", stream=io.StringIO())
    with bar:
        bar.advance(7)
        assert bar.line().startswith("reading: 7 tokens, ")
        assert "ETA" not in bar.line()
        bar.grow(10)
        bar.grow(4)
        assert bar.line().startswith("reading: 7 of 14 tokens (50.0%), ")


def test_what_an_earlier_run_did_does_not_make_this_one_look_fast() -> None:
    with Progress(2000, "tokens", initial=1000, stream=io.StringIO()) as bar:
        time.sleep(0.1)
        bar.advance(10)
        assert bar.done == 1010
        assert bar.rate_per_s < 10 / 0.1
        assert "1,010 of 2,000 tokens (50.5%)" in bar.line()


def test_the_rate_forgets_a_slow_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = Progress(None, "tokens", stream=io.StringIO())
    for tokens_per_s in [1] * 100 + [50] * 100:
        now[0] += 1.0
        bar.advance(tokens_per_s)
    assert bar.rate_per_s == pytest.approx(50, rel=0.05)


def test_an_exception_is_said_and_passes() -> None:
    stream = io.StringIO()

    def work() -> None:
        with Progress(10, "tokens", stream=stream) as bar:
            bar.advance(3)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        work()
    assert "stopped, 3 tokens" in stream.getvalue()


def test_on_a_terminal_there_is_a_bar() -> None:
    stream = Terminal()
    with Progress(10, "tokens", "compacting", stream=stream) as bar:
        bar.advance(10, documents=2)
    assert "10/10" in stream.getvalue()
    assert "documents 2" in stream.getvalue()
    assert "\x1b" in stream.getvalue()
