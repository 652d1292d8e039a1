"""From a text to windows on disk; made once for each text, tokenizer and length."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from filelock import FileLock

from actors.training.sources import WindowSource
from cluster.config import SLOTS_PER_SUPER_BLOCK
from cluster.errors import CorpusError
from cluster.progress import Progress
from models.tokenizer import Tokenizer
from storage.token_windows import TokenWindows, TokenWindowWriter, is_finished


def windows_folder(root: Path, source: WindowSource, tokenizer: Tokenizer, window_tokens: int) -> Path:
    """Where the windows of a text are kept: another text, tokenizer or length, another folder."""
    what = "\0".join((source.digest(), tokenizer.digest, str(window_tokens)))
    return root / hashlib.sha256(what.encode()).hexdigest()[:16]


def prepare_windows(
    source: WindowSource, tokenizer: Tokenizer, folder: Path, window_tokens: int, label: str
) -> TokenWindows:
    """The windows of a text, cut now unless they were before. Needs a cluster only then.

    Args:
        source: the text.
        tokenizer: of its tokens, for its digest.
        folder: of `windows_folder`; one process at a time fills it.
        window_tokens: of every window; divides 1,024, or is a multiple of it.
        label: what the text is for, in the progress display.

    Raises:
        CorpusError: no document of it is as long as a window.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not is_finished(folder):
            _cut(source, tokenizer, folder, window_tokens, label)
    windows = TokenWindows(folder)
    if len(windows) == 0:
        raise CorpusError(
            f"{source.describe()} has no document of {window_tokens} tokens: nothing to train on. Give longer "
            "documents, or lower windows.window_tokens"
        )
    return windows


def _cut(source: WindowSource, tokenizer: Tokenizer, folder: Path, window_tokens: int, label: str) -> None:
    assert SLOTS_PER_SUPER_BLOCK % window_tokens == 0 or window_tokens % SLOTS_PER_SUPER_BLOCK == 0
    origin = {"text": source.digest(), "tokenizer": tokenizer.digest}
    num_documents = num_tokens = 0
    with TokenWindowWriter(folder, window_tokens, origin) as writer, Progress(None, "windows", label) as progress:
        for table in source.tables(window_tokens):
            for row in range(table.num_rows):
                tokens = np.frombuffer(table["tokens"][row].as_buffer(), "<u4").reshape(-1, window_tokens)
                writer.append(tokens)
                progress.advance(len(tokens))
            num_documents += sum(table["num_documents"].to_pylist())
            num_tokens += sum(table["num_tokens"].to_pylist())
        writer.finish(num_documents, num_tokens)
