"""`chat` from the command line: piped questions, commands, files, a second run, a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

import ray_job
from actors.plan import plan_models
from actors.session import Session, SessionSpec
from cluster.cli import main
from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig
from cluster.environment import PROJECT_ROOT
from cluster.errors import ConfigError, CorpusError, NodeMissingError
from pipelines.chat import read_files
from pipelines.chat_commands import Commands
from storage.store import Store
from storage.tree.verify import verify_context
from tests.actors.helpers import make_text

REFUSED = 2


@pytest.fixture
def words(tmp_path: Path, tiny_lm_config) -> list[str]:
    """Of a chat with the tiny model."""
    return [
        "chat",
        *("--base_lm.source", "tiny", "--base_lm.dtype", "float32"),
        *("--base_lm.cache_dir", str(tiny_lm_config.cache_dir)),
        *("--gistnet.path", "", "--gistnet.lm_layers", "2"),
        *("--store.root", str(tmp_path / "store"), "--run.dir", str(tmp_path / "runs")),
        *("--session.budget", "400", "--session.refocus_tokens", "16", "--sampling.max_new_tokens", "24"),
        *("--tracking.enabled", "false"),
    ]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text(make_text(0, 300))
    return path


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    waiting = list(lines)

    def read(_: str = "") -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    monkeypatch.setattr("builtins.input", read)


def test_questions_and_commands(
    words: list[str], notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = make_text(0, 300)[100:160]
    pipe(
        monkeypatch, "/focus", asked, "/focus", "/why", "/show 0", "/pin 1", "/unpin 1", "/expand c:3", "/help", "/quit"
    )
    assert main(ray_job.JOBS, [*words, "--context", "c", "--files", f"[{notes}]"]) == 0
    shown = capsys.readouterr().out
    assert "nothing has been shown yet" in shown
    assert "LOD0 (raw)" in shown
    assert "words #1" in shown
    assert make_text(0, 300)[:20] in shown
    assert "c:3 is shown from the next question on" in shown
    assert "/unpin BLOCK" in shown
    folder = tmp_path / "runs" / "chat-c"
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["turns"] == 1
    assert report["refocuses"] == 2
    assert 0 < report["rows_reused_share"] < 1
    assert (folder / "focus.png").stat().st_size > 5_000
    page = (folder / "focus.html").read_text()
    assert "http" not in page, "it must open without a network"
    assert '"kind": "added"' in page


def test_one_question_as_json_and_another_run_goes_on(
    words: list[str], notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, "--json", "true", "--context", "c"]
    assert main(ray_job.JOBS, [*words, "--files", f"[{notes}]", "--prompt", "where is the tree?"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["question"] == "where is the tree?"
    assert first["num_answer_tokens"] == 24
    assert {"block", "score", "why", "text"} <= set(first["found"][0])
    assert main(ray_job.JOBS, [*words, "--files", f"[{notes}]", "--prompt", "and now?"]) == 0
    json.loads(capsys.readouterr().out)
    with Store(tmp_path / "store").open_reader("c") as reader:
        uris = [document.meta.uri for document in reader.documents()]
        tail = reader.tail()
    assert len(uris) == 1, "the same file is read once"
    assert uris[0].endswith("notes.txt")
    assert tail is not None
    assert tail.document.uri == "session:c/1"
    text = bytes(i for i in tail.tokens.tolist() if i < 256).decode("utf-8", "replace")
    assert text.index("where is the tree?") < text.index("and now?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reads", "[nowhere]"], "there is no store"),
        (["--files", "[/no/such/file]"], "/no/such/file"),
        (["--reads", "[c]"], "name a context twice"),
        (["--session.budget", "100"], "session.budget=100 must be at least"),
        (["--session.bugdet", "100"], "bugdet"),
        (["--sampling.temperature", "0"], "sampling.do_sample=false"),
        (["--context", "../up"], "may hold letters"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(ray_job.JOBS, [*words, "--context", "c", "--prompt", "x", *arguments]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store" / "c").exists()


def test_a_wrong_command_says_what_there_is(tmp_path: Path, tiny_lm_config: BaseLMConfig) -> None:
    store = StoreConfig(root=tmp_path, context="c")
    plan = plan_models(tiny_lm_config, GistNetConfig(lm_layers=2), store)
    with closing(Session(SessionSpec(plan, store))) as session:
        commands = Commands(session, lambda path: read_files(session, [path]))
        for line, error, message in (
            ("/nope", ConfigError, "there is no /nope; there are: /focus"),
            ("/show", ConfigError, "/show needs an argument"),
            ("/show x", ConfigError, "'x' names no block"),
            ("/show z:1", ConfigError, "there is no context 'z' here; there are: c"),
            ("/show 999", NodeMissingError, "999"),
            ("/read /no/such/file", CorpusError, "/no/such/file"),
        ):
            with pytest.raises(error, match=message):
                commands.run(line)


def test_a_wrong_line_of_a_pipe_ends_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "/nope")
    assert main(ray_job.JOBS, [*words, "--context", "c"]) == REFUSED
    assert "there is no /nope" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs" / "chat-c" / "report.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_what_was_said_survives_a_kill(words: list[str], tmp_path: Path) -> None:
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "ray_job.py", *words, "--context", "c", "--sampling.max_new_tokens", "100000"],
            cwd=PROJECT_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"question number {attempt}\n".encode())
        process.stdin.flush()
        heard = process.stdout.read(400 * (attempt + 1))
        time.sleep(0.05 * attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert len(heard) > 0
    store = Store(tmp_path / "store")
    assert verify_context(store.folder("c"), "c").problems == []
    with store.open_reader("c") as reader:
        assert [document.meta.uri for document in reader.documents()] == ["session:c/1"]
        tail = reader.tail()
        tokens, counts = reader.tokens(0, reader.version.num_blocks)
    ids = [int(t) for row, count in zip(tokens, counts, strict=True) for t in row[:count]]
    ids += [] if tail is None else tail.tokens.tolist()
    text = bytes(i for i in ids if i < 256).decode("utf-8", "replace")
    assert [text.count(f"question number {attempt}") for attempt in range(3)] == [1, 1, 1]
