"""Focus labels come back as they were, and are refused where they would teach something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.errors import StorageError
from storage.focus import labels as focus_labels
from storage.focus.labels import LabelledContext, LabelledEdit, label_settings, read_labels, write_labels

FEATURES = ["age", "match"]


def labelled(number: int, num_blocks: int = 3) -> LabelledContext:
    rng = np.random.default_rng(number)
    blocks = np.sort(rng.choice(100, num_blocks, replace=False)).astype(np.int64)
    edits: tuple[LabelledEdit, ...] = ()
    if num_blocks:
        first, second, *_ = blocks.tolist()
        edits = (
            LabelledEdit((), (first,), (), (2.0, 2.5), (1.5, 2.75)),
            LabelledEdit((first, second), (), (second,), (1.0, 1.0), (1.25, 1.0)),
        )
    return LabelledContext(
        "notes", 7, number, f"doc{number}", 0, 128, 120, blocks,
        rng.random((num_blocks, 2), np.float32),
        rng.standard_normal((num_blocks, 4)).astype(np.float16),
        rng.standard_normal(4).astype(np.float16),
        edits,
    )  # fmt: skip


def test_labels_come_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "labels.parquet"
    given = [labelled(0), labelled(1, num_blocks=5), labelled(2, num_blocks=0)]
    write_labels(path, given, FEATURES, {"seed": 3})
    found = read_labels(path, FEATURES)
    assert [context.number for context in found] == [0, 1, 2]
    for wanted, context in zip(given, found, strict=True):
        assert (context.context, context.version, context.uri, context.shown_from) == ("notes", 7, wanted.uri, 120)
        for name in ("blocks", "features", "keys", "query"):
            np.testing.assert_array_equal(getattr(context, name), getattr(wanted, name))
        assert context.edits == wanted.edits
    assert label_settings(path) == {"seed": 3}
    assert sorted(p.name for p in path.parent.iterdir()) == ["labels.parquet"]
    write_labels(path, given[:1], FEATURES, {})
    assert len(read_labels(path, FEATURES)) == 1


def test_edits_say_what_they_do_and_what_it_was_worth() -> None:
    def edit(shown: tuple[int, ...], added: tuple[int, ...], removed: tuple[int, ...]) -> LabelledEdit:
        return LabelledEdit(shown, added, removed, (2.0, 1.0), (1.5, 1.25))

    kinds = [edit((), (1,), ()), edit((1,), (), (1,)), edit((1,), (2,), (1,)), edit((), (1, 2), ())]
    assert [e.kind for e in kinds] == list(focus_labels.EDIT_KINDS)
    assert kinds[0].gains == (0.5, -0.25)


def test_labels_of_other_features_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.parquet"
    write_labels(path, [labelled(0)], FEATURES, {})
    with pytest.raises(StorageError, match=r"other features \(\['match', 'smell'\]\)"):
        read_labels(path, ["age", "smell"])
    with pytest.raises(StorageError, match="their order"):
        read_labels(path, FEATURES[::-1])


def test_what_is_no_file_of_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there are no labels"):
        read_labels(tmp_path / "labels.parquet", FEATURES)
    (tmp_path / "text.parquet").write_bytes(b"text")
    with pytest.raises(StorageError, match="holds no labels"):
        read_labels(tmp_path / "text.parquet", FEATURES)
    write_labels(tmp_path / "old.parquet", [labelled(0)], FEATURES, {})
    pq.write_table(pq.read_table(tmp_path / "old.parquet").drop(["query"]), tmp_path / "old.parquet")
    with pytest.raises(StorageError, match="make them anew"):
        read_labels(tmp_path / "old.parquet", FEATURES)


def test_a_disk_that_refuses_leaves_the_old_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "labels.parquet"
    write_labels(path, [labelled(0)], FEATURES, {})

    def full(target: Path, content: bytes) -> None:
        target.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(focus_labels, "write_file_durably", full)
    with pytest.raises(StorageError, match="cannot write labels"):
        write_labels(path, [labelled(1)], FEATURES, {})
    assert read_labels(path, FEATURES)[0].number == 0
    assert [p.name for p in tmp_path.iterdir()] == ["labels.parquet"]
