"""Windows on disk: read back in any order, and nothing that is not whole is served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import CorruptTreeError, StorageError
from storage import token_windows as module
from storage.token_windows import MANIFEST, TokenWindows, TokenWindowWriter, is_finished

T = 8


def written(folder: Path, num_windows: int = 11, batch: int = 3) -> np.ndarray:
    windows = np.arange(num_windows * T, dtype=np.uint32).reshape(-1, T)
    with TokenWindowWriter(folder, T, {"corpus": "c0"}) as writer:
        for first in range(0, num_windows, batch):
            writer.append(windows[first : first + batch])
        writer.finish(num_documents=2, num_tokens=100)
    return windows


@pytest.mark.parametrize("per_file", [4, 65_536])
@pytest.mark.parametrize("batch", [1, 3, 11])
def test_windows_are_read_in_the_order_asked_for(
    tmp_path: Path, per_file: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOWS_PER_FILE", per_file)
    expected = written(tmp_path / "w", batch=batch)
    windows = TokenWindows(tmp_path / "w")
    assert len(windows) == 11
    assert len(windows.manifest.files) == (1 if per_file > 11 else 4 if batch == 3 else 3)
    order = [10, 0, 3, 3, 7]
    np.testing.assert_array_equal(windows.read(order), expected[order])
    assert windows.read([]).shape == (0, T)
    assert windows.manifest.kept_share == pytest.approx(0.88)
    assert windows.manifest.origin == {"corpus": "c0"}
    np.testing.assert_array_equal(windows.sample(3 * T + 1), expected[[0, 5, 10]])
    np.testing.assert_array_equal(windows.sample(1), expected[:1])
    np.testing.assert_array_equal(windows.sample(10**6), expected)
    for wrong in ([11], [-1]):
        with pytest.raises(StorageError, match="windows 0 to 10"):
            windows.read(wrong)


def test_an_unfinished_folder_is_refused_and_begun_anew(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    with TokenWindowWriter(folder, T, {}) as writer:
        writer.append(np.ones((5, T), np.uint32))
    assert not is_finished(folder)
    with pytest.raises(StorageError, match="no finished windows"):
        TokenWindows(folder)
    written(folder, num_windows=2)
    assert is_finished(folder)
    assert len(TokenWindows(folder)) == 2


def test_damage_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    written(folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    for change, message in (
        ({"num_windows": 12}, "holds 11 windows, windows.json says 12"),
        ({"format_version": 9}, "is of format 9"),
        ({"extra": 1}, "windows.json is damaged"),
    ):
        (folder / MANIFEST).write_text(json.dumps({**manifest, **change}))
        with pytest.raises(StorageError, match=message):
            TokenWindows(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(StorageError, match="damaged"):
        TokenWindows(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    part = folder / manifest["files"][0]
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(CorruptTreeError, match="part-00000.arrow is damaged"):
        TokenWindows(folder)


def test_no_windows_at_all(tmp_path: Path) -> None:
    written(tmp_path / "w", num_windows=0)
    assert len(TokenWindows(tmp_path / "w")) == 0
