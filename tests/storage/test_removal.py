"""Documents that are taken out, and documents that are erased."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cluster.config import TOKENS_PER_BLOCK as K
from cluster.errors import BranchConflictError, StorageError
from storage.lexical.index import LexicalWriter
from storage.lexical.search import LexicalSearcher
from storage.store import Store
from storage.versions import removal
from storage.versions.backup import back_up
from storage.versions.branching import Branching
from storage.versions.removal import erase_documents, remove_documents, scrub, wants_scrub
from tests.storage.support import CONTEXT, Text, encoding_of, new_store, open_context, rows
from tests.storage.version_support import history, holds, is_sound, write

ENCODING = encoding_of("float16", width=8, key_width=6)
TEXTS = [Text("one", 90 * K), Text("secret", 70 * K - 5), Text("two", 300 * K), Text("three", 41 * K + 3)]
KEPT = [TEXTS[0], TEXTS[2], TEXTS[3]]
NEVER_S = 1e9


@pytest.fixture
def root(tmp_path: Path) -> Path:
    new_store(tmp_path, ENCODING)
    return tmp_path


def traces(root: Path, text: Text) -> set[str]:
    """Files of the context that hold tokens, gists, keys or words of a document, or its name."""
    tokens, _ = text.packed(0, text.num_blocks)
    arrays = {spec.name: text.gists(0, text.num_blocks, spec).half().numpy() for spec in ENCODING.arrays}
    needles = [text.meta.uri.encode(), word(int(tokens[3, 5])).encode()]
    for block in range(0, text.num_blocks, 7):
        needles += [tokens[block].astype("<u4").tobytes(), *(values[block].tobytes() for values in arrays.values())]
    found = set()
    for path in (root / CONTEXT).rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if any(needle in data for needle in needles):
                found.add(str(path.relative_to(root / CONTEXT)))
    return found


def word(token: int) -> str:
    return f"w{token}x"


def decode(texts: Sequence[np.ndarray]) -> list[str]:
    return [" ".join(word(int(token)) for token in tokens) for tokens in texts]


def test_what_is_taken_out_can_be_had_back(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, *TEXTS)
        before = writer.version().seq
        done = remove_documents(writer, ["secret"], "not wanted")
        assert (done.documents, done.blocks, done.moved_blocks) == (1, 70, 342)
        holds(root, *KEPT)
        write(writer, Text("four", 33 * K))
        holds(root, *KEPT, Text("four", 33 * K))
        holds(root, *TEXTS, seq=before)
        assert history(root).log("main", 3)[-1].message == "not wanted"
        Branching(writer).roll_back(before)
        holds(root, *TEXTS)
    is_sound(root)


def test_what_was_taken_out_does_not_come_back_by_a_merge(root: Path) -> None:
    secret, new, more = TEXTS[1], Text("new", 33 * K), Text("more", 40 * K)
    with open_context(root) as writer:
        write(writer, *TEXTS)
        whole = writer.version().seq
        branching = Branching(writer)
        branching.fork("side")
        remove_documents(writer, ["secret"])
        remove_documents(writer, ["one"])
        branching.fork("late", at_block=20)
        writer.switch("side")
        write(writer, new)
        writer.switch("main")
        merged = branching.merge("side")
        assert (merged.documents, merged.skipped_documents, merged.removed_documents) == (1, 2, 2)
        holds(root, TEXTS[2], TEXTS[3], new)
        # Nor on a branch that was forked since, wherever; but where they were never taken out, and where they come
        # again of their own.
        writer.switch("late")
        writer.close_document("two")
        assert branching.merge("side").removed_documents == 2
        writer.switch("main")
        branching.roll_back(whole)
        write(writer, more)
        merged = branching.merge("side")
        assert (merged.documents, merged.removed_documents) == (1, 0)
        holds(root, *TEXTS, more, new)
        remove_documents(writer, ["secret"])
        write(writer, secret)
        merged = branching.merge("side")
        assert (merged.documents, merged.removed_documents) == (0, 0)
        holds(root, *KEPT, more, new, secret)
    is_sound(root)


def test_removals_that_do_not_say_of_what_are_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_context(root) as writer:
        write(writer, *TEXTS)
        Branching(writer).fork("side")
        audit = writer.audit
        with monkeypatch.context() as patch:
            # As programs wrote it before.
            older = {"branch": "main", "from": 5, "to": 9}
            patch.setattr(writer, "audit", lambda db, action, _: audit(db, action, older))
            remove_documents(writer, ["secret"])
        merged = Branching(writer).merge("side")
        assert (merged.documents, merged.removed_documents) == (1, 0)
        holds(root, *KEPT, TEXTS[1])


def test_searches_find_blocks_where_they_are_now(root: Path) -> None:
    """An index of the branch that had the name before would name blocks of another timeline."""
    with open_context(root) as writer, LexicalSearcher(writer.folder, decode) as searcher:
        write(writer, *TEXTS)
        with LexicalWriter(writer.folder, decode) as index, writer.reader() as reader:
            index.advance(reader)
        before = writer.version().seq

        def found(text: Text, block: int) -> list[int]:
            with writer.reader() as reader:
                tokens, _ = text.packed(0, text.num_blocks)
                query = " ".join(word(int(token)) for token in tokens[block][:6])
                return searcher.search(reader, query, 1)[0].tolist()

        assert found(TEXTS[2], 7) == [90 + 70 + 7]
        remove_documents(writer, ["secret"])
        assert found(TEXTS[2], 7) == [90 + 7]
        with LexicalWriter(writer.folder, decode) as index, writer.reader() as reader:
            index.advance(reader)
        assert found(TEXTS[2], 7) == [90 + 7]
        Branching(writer).roll_back(before)
        assert found(TEXTS[2], 7) == [90 + 70 + 7]
        assert found(TEXTS[1], 7) == [90 + 7]


def test_several_documents_and_the_last_one(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, *TEXTS)
        remove_documents(writer, ["one", "three", "secret"])
        holds(root, TEXTS[2])
        remove_documents(writer, ["two"])
        assert writer.version().num_blocks == 0
        write(writer, *TEXTS)
    holds(root, *TEXTS)
    is_sound(root)


def test_an_interrupted_removal_changes_nothing_and_is_done_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_context(root) as writer:
        write(writer, *TEXTS)
        with monkeypatch.context() as patch:
            patch.setattr(Branching, "take_over", lambda *_: (_ for _ in ()).throw(OSError("the power went")))
            with pytest.raises(OSError, match="the power went"):
                remove_documents(writer, ["secret"])
        assert writer.version().branch == "main"
        holds(root, *TEXTS)
    with open_context(root) as writer:
        remove_documents(writer, ["secret"])
    holds(root, *KEPT)
    is_sound(root)


@pytest.mark.parametrize("sealed", [False, True])
def test_of_an_erased_document_no_byte_is_left(root: Path, sealed: bool) -> None:
    store = Store(root)
    with open_context(root, seal_in_background=False, segment_super_blocks=4) as writer:
        write(writer, *TEXTS)
        if sealed:
            writer.flush()
        Branching(writer).fork("side", at_block=95)
        before = writer.version().seq
        remove_documents(writer, ["three"])
        Branching(writer).roll_back(before)
        with LexicalWriter(writer.folder, decode) as index, writer.reader() as reader:
            index.advance(reader)
        assert {"catalogue.sqlite", "lexical.sqlite"} <= {name.removesuffix("-wal") for name in traces(root, TEXTS[1])}
        with pytest.raises(BranchConflictError, match="branch 'side' still show"):
            erase_documents(store, writer, ["secret"], keep_s=NEVER_S)
        holds(root, *TEXTS)
        Branching(writer).discard("side")
        # A branch that parts before the document keeps its share of the segment the document began in.
        Branching(writer).fork("early", seq=before, at_block=90)
        done = erase_documents(store, writer, ["secret"], keep_s=NEVER_S)
        assert (done.documents, done.blocks) == (1, 70)
        holds(root, *KEPT)
        holds(root, TEXTS[0], branch="early")
        assert traces(root, TEXTS[1]) == set()
        assert traces(root, TEXTS[3])
        entry = history(root).audit(2)[-1]
        assert (entry.action, entry.detail["documents"]) == ("erase", 1)
        assert "secret" not in str(entry)
    is_sound(root)


def test_the_next_backup_does_not_hold_it_either(root: Path, tmp_path: Path) -> None:
    store, target = Store(root), tmp_path / "backup"
    with open_context(root, seal_in_background=False, segment_super_blocks=4) as writer:
        write(writer, *TEXTS)
        writer.flush()
        back_up(store, CONTEXT, target)
        assert traces(target, TEXTS[1])
        erase_documents(store, writer, ["secret"], keep_s=NEVER_S)
        back_up(store, CONTEXT, target)
    assert traces(target, TEXTS[1]) == set()
    holds(target, *KEPT)


@pytest.mark.parametrize("held_by", ["a reader", "tag"])
def test_what_is_still_shown_is_not_erased(root: Path, held_by: str) -> None:
    store = Store(root)
    with open_context(root, seal_in_background=False) as writer:
        write(writer, *TEXTS)
        before = writer.version().seq
        reader = store.open_reader(CONTEXT) if held_by == "a reader" else None
        if reader is None:
            Branching(writer).tag("v1")
        with pytest.raises(BranchConflictError, match=held_by):
            erase_documents(store, writer, ["secret"], keep_s=0.0)
        assert writer.version().seq == before
        if reader is not None:
            reader.close()
        else:
            Branching(writer).delete_tag("v1")
        erase_documents(store, writer, ["secret"], keep_s=0.0)
        assert traces(root, TEXTS[1]) == set()


def test_a_group_that_an_older_version_shows_in_part_keeps_that_part_only(root: Path) -> None:
    for sealed in (False, True):
        with open_context(root, seal_in_background=False, segment_super_blocks=4) as writer:
            number = len(history(root).tags())
            texts = [Text(f"{t.key}{number}", t.num_tokens) for t in TEXTS]
            write(writer, texts[0])
            before = list(writer.reader().documents())
            Branching(writer).tag(f"v{number}")
            write(writer, *texts[1:])
            if sealed:
                writer.flush()
            erase_documents(Store(root), writer, [texts[1].key], keep_s=NEVER_S)
            assert traces(root, texts[1]) == set()
            with Store(root).open_reader(CONTEXT, f"v{number}") as reader:
                assert reader.documents() == before
                tokens, _ = reader.tokens(before[-1].first_block, 90)
                np.testing.assert_array_equal(tokens, texts[0].packed(0, 90)[0])
        is_sound(root)


@pytest.mark.parametrize("step", ["commit", "collect", "scrub"])
def test_an_interrupted_erase_is_finished(root: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    store = Store(root)
    with open_context(root, seal_in_background=False) as writer:
        write(writer, *TEXTS)
        with LexicalWriter(writer.folder, decode) as index, writer.reader() as reader:
            index.advance(reader)
        owner, name = {
            "commit": (removal, "_want_scrub"),
            "collect": (store, "collect"),
            "scrub": (removal, "scrub"),
        }[step]

        def stop(*_: object, **__: object) -> None:
            raise OSError("the power went")

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            with pytest.raises(OSError, match="the power went"):
                erase_documents(store, writer, ["secret"], keep_s=NEVER_S)
        holds(root, *KEPT)
    with open_context(root, seal_in_background=False) as writer:
        if step == "scrub":
            assert wants_scrub(writer)
            scrub(writer)
        else:
            erase_documents(store, writer, ["secret"], keep_s=NEVER_S)
        assert not wants_scrub(writer)
        assert traces(root, TEXTS[1]) == set()
    is_sound(root)


def test_a_tail_on_a_fork_is_still_shown(root: Path) -> None:
    secret = TEXTS[1]
    with open_context(root) as writer:
        write(writer, TEXTS[0])
        writer.append_tail(secret.meta, 0, secret.tokens(0, 20))
        Branching(writer).fork("side")
        writer.append([secret.span(ENCODING)])
        with pytest.raises(BranchConflictError, match="branch 'side' still show"):
            erase_documents(Store(root), writer, ["secret"], keep_s=NEVER_S)
        Branching(writer).discard("side")
        erase_documents(Store(root), writer, ["secret"], keep_s=NEVER_S)
        assert traces(root, secret) == set()
        assert rows(writer, "SELECT count(*) FROM tails") == [(0,)]


def test_a_document_that_was_cut_before_its_first_block_is_erased(root: Path) -> None:
    secret = TEXTS[1]
    with open_context(root) as writer:
        write(writer, TEXTS[0])
        writer.append_tail(secret.meta, 0, secret.tokens(0, 20))
        writer.close_document("secret")
        write(writer, TEXTS[2])
        erase_documents(Store(root), writer, ["secret"], keep_s=NEVER_S)
        assert b"secret" not in (root / CONTEXT / "catalogue.sqlite").read_bytes()
    holds(root, TEXTS[0], TEXTS[2])


def test_what_is_not_there_or_still_open_is_refused(root: Path) -> None:
    with open_context(root) as writer:
        write(writer, TEXTS[0])
        with pytest.raises(StorageError, match="has no document 'nobody'"):
            remove_documents(writer, ["one", "nobody"])
        writer.append([TEXTS[1].span(ENCODING, 0, 4)])
        with pytest.raises(BranchConflictError, match="'secret' is still open"):
            remove_documents(writer, ["one"])
        assert writer.version().num_blocks == 94
    is_sound(root)
