"""tree export and tree import, as they are called from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ray_job
from cluster.cli import main
from cluster.config import TOKENS_PER_BLOCK as K
from storage.store import Store
from tests.storage.support import CONTEXT, Text, assert_holds, encoding_of, follow, new_store, open_context

ENCODING = encoding_of("float16")
ONE, TWO = Text("one", 100 * K), Text("two", 60 * K - 7)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path, ENCODING)
    with open_context(tmp_path, segment_super_blocks=32) as writer:
        writer.append([text.span(ENCODING) for text in (ONE, TWO)])
        follow(writer, ENCODING)
    return tmp_path


def run(root: Path, *words: str, context: str = CONTEXT) -> int:
    return main(ray_job.JOBS, ["tree", *words, "--store.root", str(root), "--store.context", context])


def asked(root: Path, capsys: pytest.CaptureFixture[str], *words: str, context: str = CONTEXT) -> dict[str, Any]:
    capsys.readouterr()
    assert run(root, *words, "--json", "true", context=context) == 0
    return json.loads(capsys.readouterr().out)


def test_a_context_goes_to_another_store(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = root / "all.mcb", root / "other"
    sent = asked(root, capsys, "export", "--to", str(file))
    assert (sent["num_blocks"], sent["num_documents"], sent["upper_nodes"]) == (160, 2, [5])
    assert sent["file_bytes"] == file.stat().st_size
    got = asked(other, capsys, "import", "--from_file", str(file), context="copy")
    assert (got["new_documents"], got["new_blocks"], got["new_nodes"], got["levels_missing"]) == (2, 160, 5, False)
    assert got["bundle"]["context"] == CONTEXT
    with Store(other).open_reader("copy") as reader:
        assert_holds(reader, [ONE, TWO], ENCODING)
    newest = asked(other, capsys, "log", context="copy")["versions"][0]
    assert newest["seq"] == got["version"]
    assert run(other, "verify", context="copy") == 0
    assert asked(other, capsys, "import", "--from_file", str(file), context="copy")["new_blocks"] == 0


def test_a_span_goes_to_a_branch(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = root / "span.mcb"
    asked(root, capsys, "export", "--to", str(file), "--first_block", "100", "--num_blocks", "60")
    assert run(root, "branch", "--create", "side", "--at_block", "100") == 0
    got = asked(root, capsys, "import", "--from_file", str(file), "--store.version", "side")
    assert (got["new_documents"], got["new_blocks"], got["levels_missing"]) == (1, 60, True)
    with Store(root).open_reader(CONTEXT, "side") as reader:
        assert_holds(reader, [ONE, TWO], ENCODING)


def test_people_get_tables_and_progress(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = root / "all.mcb"
    assert run(root, "export", "--to", str(file)) == 0
    shown = capsys.readouterr()
    assert "`tree import --from_file all.mcb` brings it in" in shown.out
    assert "exporting: done, 160 blocks" in shown.err
    assert run(root / "other", "import", "--from_file", str(file), context="copy") == 0
    shown = capsys.readouterr()
    assert "Imported into branch main of copy" in shown.out
    assert "importing: done, 320 blocks" in shown.err
    assert run(root, "export", "--to", str(file)) == 5
    assert "--overwrite true to replace it" in capsys.readouterr().err
    assert run(root, "export", "--to", str(file), "--overwrite", "true") == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["export"], 2, "to is empty"),
        (["export", "--to", "a", "--first_block", "-1"], 2, "must be 0 or more"),
        (["export", "--to", "a", "--num_blocks", "0"], 2, "must be 1 or more"),
        (["export", "--to", "a", "--first_block", "160"], 5, "has 160 blocks; 0 blocks from 160 on"),
        (["export", "--to", "a", "--first_block", "999"], 5, "has 160 blocks"),
        (["export", "--to", "a", "--store.version", "v9"], 5, "has no version 'v9'"),
        (["import"], 2, "from_file is empty"),
        (["import", "--from_file", "nowhere"], 5, "there is no file"),
        (["import", "--from_file", "ctx/catalogue.sqlite"], 5, "is no bundle of `tree export`"),
    ],
)
def test_what_cannot_be_done_is_said(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(root)
    assert run(root, *words) == code
    assert said in capsys.readouterr().err
    assert not (root / "a").exists()
