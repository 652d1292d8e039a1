"""The jobs that show and move versions, as they are called from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ray_job
from cluster.cli import main
from cluster.config import TOKENS_PER_BLOCK as K
from storage.store import Store
from tests.storage.support import CONTEXT, Text, encoding_of, follow, new_store, open_context

ENCODING = encoding_of("float16")
ONE, TWO = Text("one", 100 * K), Text("two", 60 * K - 7)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path, ENCODING)
    with open_context(tmp_path) as writer:
        for text in (ONE, TWO):
            writer.append([text.span(ENCODING)])
        follow(writer, ENCODING)
    return tmp_path


def run(root: Path, *words: str) -> int:
    return main(ray_job.JOBS, [*words, "--store.root", str(root), "--store.context", CONTEXT])


def asked(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(root, *words, "--json", "true") == 0
    return json.loads(capsys.readouterr().out)


def test_a_branch_is_made_filled_merged_and_discarded(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "tree", "branch", "--create", "side", "--at_block", "100") == 0
    with open_context(root, branch="side") as writer:
        writer.append([Text("three", 45 * K).span(ENCODING)])
    found = asked(root, capsys, "tree", "diff", "--other", "side")
    assert found["shared_blocks"] == 100
    assert [d["meta"]["key"] for d in found["only_left"]] == ["two"]
    assert [d["meta"]["key"] for d in found["only_right"]] == ["three"]
    merged = asked(root, capsys, "tree", "branch", "--merge", "side", "--message", "all together")["merge"]
    assert (merged["fast_forward"], merged["documents"], merged["blocks"]) == (False, 1, 45)
    shown = asked(root, capsys, "tree", "show", "--documents", "1")
    assert (shown["branch"], shown["num_documents"]) == ("main", 3)
    assert shown["documents"][0]["meta"]["key"] == "three"
    assert asked(root, capsys, "tree", "show", "--store.version", "side")["forks"] == [["main", 100]]
    assert asked(root, capsys, "tree", "log")["versions"][0]["message"] == "all together"
    left = asked(root, capsys, "tree", "branch", "--discard", "side")["branches"]
    assert [branch["name"] for branch in left] == ["main"]


def test_a_rollback_is_undone_by_another(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tags = asked(root, capsys, "tree", "tag", "--create", "v1", "--message", "first")["tags"]
    assert [(tag["name"], tag["message"]) for tag in tags] == [("v1", "first")]
    with open_context(root) as writer:
        writer.append([Text("three", 45 * K).span(ENCODING)])
    done = asked(root, capsys, "tree", "rollback", "--to", "v1")
    with Store(root).open_reader(CONTEXT) as reader:
        assert [d.meta.key for d in reader.documents()] == ["one", "two"]
    assert run(root, "tree", "rollback", "--to", str(done["from"])) == 0
    assert f"`tree rollback --to {done['version']}`" in " ".join(capsys.readouterr().out.split())
    with Store(root).open_reader(CONTEXT) as reader:
        assert [d.meta.key for d in reader.documents()] == ["one", "two", "three"]
    with Store(root).open_reader(CONTEXT, "v1") as reader:
        assert reader.version.num_blocks == 160
    actions = [entry["action"] for entry in asked(root, capsys, "tree", "log", "--audit", "true")["audit"]]
    assert actions == ["roll_back", "roll_back", "tag"]
    assert asked(root, capsys, "tree", "tag", "--delete", "v1")["tags"] == []


def test_garbage_is_shown_before_it_is_removed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(root, "tree", "branch", "--create", "side", "--at_block", "10") == 0
    assert run(root, "tree", "rollback", "--to", "side") == 0
    for apply in ("false", "true"):
        assert asked(root, capsys, "tree", "gc", "--apply", apply)["versions"] == 0
        found = asked(root, capsys, "tree", "gc", "--apply", apply, "--keep_days", "0")
        assert (found["applied"], found["documents"]) == (apply == "true", 2)
        assert found["segments"]
    assert not asked(root, capsys, "tree", "gc", "--keep_days", "0")["segments"]
    assert run(root, "tree", "verify") == 0


def test_documents_are_taken_out_and_had_back_or_erased(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delete = ["tree", "delete", "--documents", '["*one"]']
    looked = asked(root, capsys, *delete)
    assert ([d["meta"]["key"] for d in looked["documents"]], looked["applied"]) == (["one"], False)
    before = asked(root, capsys, "tree", "show")["version"]
    done = asked(root, capsys, *delete, "--apply", "true")
    assert (done["blocks"], done["moved_blocks"]) == (100, 60)
    assert asked(root, capsys, "tree", "show")["num_documents"] == 1
    assert run(root, "tree", "rollback", "--to", str(before)) == 0
    assert asked(root, capsys, "tree", "show")["num_documents"] == 2
    assert run(root, "tree", "tag", "--create", "held") == 0
    assert asked(root, capsys, *delete, "--erase", "true")["still_shown_by"] == ["tag 'held'"]
    assert run(root, *delete, "--erase", "true", "--apply", "true") == 5
    assert "tag 'held' still show" in capsys.readouterr().err
    assert run(root, "tree", "tag", "--delete", "held") == 0
    assert asked(root, capsys, *delete, "--erase", "true", "--apply", "true")["erased"]
    assert run(root, "tree", "rollback", "--to", str(before)) == 5
    assert run(root, "tree", "verify") == 0


def test_what_was_taken_out_stays_out_of_a_merge_and_is_told_in_short(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_context(root) as writer:
        writer.append([Text(f"more{number}", 40).span(ENCODING) for number in range(5)])
    assert run(root, "tree", "branch", "--create", "side") == 0
    assert run(root, "tree", "delete", "--documents", '["*more*"]', "--apply", "true") == 0
    merged = asked(root, capsys, "tree", "branch", "--merge", "side")["merge"]
    assert (merged["documents"], merged["removed_documents"]) == (0, 5)
    lines = asked(root, capsys, "tree", "log", "--audit", "true")["audit"]
    assert [len(line["detail"]["keys"]) for line in lines if line["action"] == "remove"] == [5]
    assert run(root, "tree", "log", "--audit", "true") == 0
    said = capsys.readouterr().out
    assert "2 more" in " ".join(said.replace("│", " ").split())


def test_what_an_updated_file_left_behind_goes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_context(root) as writer:
        newer = Text("one", 30 * K)
        span = newer.span(ENCODING)
        writer.append([replace(span, document=replace(newer.meta, key="one@newer"))])
    done = asked(root, capsys, "tree", "delete", "--superseded", "true", "--apply", "true")
    assert [d["meta"]["key"] for d in done["documents"]] == ["one"]
    with Store(root).open_reader(CONTEXT) as reader:
        assert [d.meta.key for d in reader.documents()] == ["two", "one@newer"]


def test_erasing_what_is_superseded_looks_at_the_branch_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A retired branch, where the newest document of a URI is an older one, has no say in what is newest."""
    with open_context(root) as writer:
        before = writer.version().seq
        newer = Text("one", 30 * K)
        writer.append([replace(newer.span(ENCODING), document=replace(newer.meta, key="one@newer"))])
    after = asked(root, capsys, "tree", "show")["version"]
    assert run(root, "tree", "rollback", "--to", str(before)) == 0
    assert run(root, "tree", "rollback", "--to", str(after)) == 0
    done = asked(root, capsys, "tree", "delete", "--superseded", "true", "--erase", "true", "--apply", "true")
    assert [d["meta"]["key"] for d in done["documents"]] == ["one"]
    with Store(root).open_reader(CONTEXT) as reader:
        assert [d.meta.key for d in reader.documents()] == ["two", "one@newer"]


def test_a_backup_is_verified_and_read_where_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = root / "elsewhere"
    first = asked(root, capsys, "tree", "backup", "--to", str(target))
    assert first["segments"] == first["copied_segments"] > 0
    assert run(root, "tree", "backup", "--to", str(target)) == 0
    assert "elsewhere" in capsys.readouterr().out
    assert run(target, "tree", "verify") == 0
    assert asked(target, capsys, "tree", "show")["num_documents"] == 2


@pytest.mark.parametrize("job", ["log", "show", "branch", "tag", "diff", "gc"])
def test_people_get_tables(root: Path, capsys: pytest.CaptureFixture[str], job: str) -> None:
    assert run(root, "tree", job) == 0
    assert CONTEXT in capsys.readouterr().out or job == "diff"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["rollback"], 2, "to is empty"),
        (["rollback", "--to", "nothing"], 5, "give a branch (main), a tag (none)"),
        (["branch", "--create", "a", "--discard", "b"], 2, "one of create, merge and discard"),
        (["branch", "--create", "main"], 5, "has a branch 'main' already"),
        (["branch", "--create", "a", "--at_block", "999"], 5, "cannot be forked at block 999"),
        (["show", "--store.version", "v9"], 5, "has no version 'v9'"),
        (["log", "--limit", "0"], 2, "must be at least 1"),
        (["tag", "--delete", "v9"], 5, "no tag 'v9'"),
        (["backup"], 2, "to is empty"),
        (["delete"], 2, "documents is empty"),
        (["delete", "--documents", "[nothing]"], 2, "fits 'nothing'"),
    ],
)
def test_what_cannot_be_done_is_said(
    root: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert run(root, "tree", *words) == code
    assert said in capsys.readouterr().err
