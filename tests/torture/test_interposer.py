"""Without the library nothing would be tested, so its absence is an error."""

from __future__ import annotations

import errno
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.torture import interposer
from tests.torture.children import Child
from tests.torture.crash_image import read_log
from tests.torture.interposer import Action, Kind, Plan, arm, heal, num_points


def test_a_missing_compiler_is_said(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interposer.shutil, "which", lambda _: None)
    monkeypatch.setattr(interposer.tempfile, "gettempdir", lambda: str(scratch))
    with pytest.raises(RuntimeError, match="need a C compiler"):
        interposer.library.__wrapped__()


def test_a_process_that_is_not_under_it_is_refused(scratch: Path) -> None:
    with pytest.raises(RuntimeError, match="was not started by"):
        arm(Plan(scratch))


def _write(connection: Connection, plan: Plan) -> None:
    arm(plan)
    for name in ("a", "b", "c"):
        try:
            (plan.root / name).write_bytes(b"x" * 10)
        except OSError as error:
            connection.send((name, error.errno))
    heal()
    (plan.root / "d").write_bytes(b"y")
    (plan.root / "d").rename(plan.root / "e")
    connection.send(("points", num_points()))


def test_points_are_counted_refused_and_logged(scratch: Path) -> None:
    root = scratch / "root"
    root.mkdir()
    plan = Plan(root, scratch / "log", Action.FAIL, Kind.WRITE, "/[abd]", first=2, error=errno.EDQUOT)
    with Child(_write, plan) as child:
        assert list(child.words()) == [("b", errno.EDQUOT), ("points", 3)]
    done = [(each.kind, each.path, each.target) for each in read_log(scratch / "log", root)]
    opened = [(Kind.OPEN, name, "") for name in "abcd"]
    written = [(Kind.WRITE, name, "") for name in "acd"]
    assert sorted(done) == sorted([*opened, *written, (Kind.RENAME, "d", "e")])


def test_a_kill_leaves_half_of_a_write(scratch: Path) -> None:
    with Child(_write, Plan(scratch, action=Action.KILL, kinds=Kind.WRITE, first=2)) as child:
        assert child.end() == -9
    assert [(scratch / name).stat().st_size for name in ("a", "b")] == [10, 5]
    assert not (scratch / "c").exists()
