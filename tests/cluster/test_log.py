from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cluster.log import get_logger, logging_to


def test_terminal_gets_short_lines_and_the_file_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.log"
    with logging_to(file):
        get_logger("part").debug("details")
        get_logger("part").info("%d tokens", 5)
        get_logger("part").warning("careful")
        logging.getLogger("some.library").warning("theirs")
        logging.getLogger("some.library").info("chatter")
        logging.getLogger("mlflow.store").info("chatter")
    assert capsys.readouterr().err == "5 tokens\nwarning: careful\n"
    lines = file.read_text().splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == ["details", "5 tokens", "careful", "theirs"]
    assert " DEBUG megacontext.part " in lines[0]
    assert lines[0][:2] == "20"


def test_it_stops_with_the_block_and_continues_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.log"
    handlers = list(logging.getLogger().handlers)
    for text in ("one", "two"):
        with logging_to(file):
            get_logger("part").info(text)
        get_logger("part").info("outside")
    assert capsys.readouterr().err == "one\ntwo\n"
    assert [line.rsplit(" ", 1)[1] for line in file.read_text().splitlines()] == ["one", "two"]
    assert logging.getLogger().handlers == handlers


def test_within_another_one_a_line_is_shown_once_and_kept_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outer, inner = tmp_path / "outer.log", tmp_path / "inner.log"
    with logging_to(outer):
        with logging_to(inner):
            get_logger("part").info("both")
        get_logger("part").info("outer")
    assert capsys.readouterr().err == "both\nouter\n"
    assert len(outer.read_text().splitlines()) == 2
    assert len(inner.read_text().splitlines()) == 1
