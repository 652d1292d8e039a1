"""A bulk corpus of any size, the same on every machine of a Python version: the standard library, shuffled by lines.

File i of the corpus follows from i alone: sources drawn at random, their lines in another order, as JSON Lines. So
the text is real code and prose, no document comes twice, and any consecutive files are a corpus of their own.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import random
from pathlib import Path

from benchmarks.harness import Setting
from cluster.config import CorpusConfig
from storage.corpus import CorpusSource, Document, open_corpus, read_corpus, standard_library_corpus

RECIPE = 1
"""Raised when the files would come out different, so that old ones are not taken."""

FILE_BYTES = 128 * 2**10
"""Of a file's text: about 34,000 tokens of SmolLM2's tokenizer."""

QUICK_FILE_BYTES = 16 * 2**10
"""The tiny model's tokens are single bytes, or little more."""

TOKENS_PER_FILE = 33_000
"""Of a full file, a low estimate: so many files hold at least what was asked for."""

MAX_DOCUMENT_CHARACTERS = 32 * 2**10


def corpus_files(setting: Setting, first: int, count: int) -> list[Path]:
    """Files `[first, first + count)` of the corpus, written now where they are not there yet."""
    num_bytes = setting.size(FILE_BYTES, QUICK_FILE_BYTES)
    folder = setting.cache / f"corpus-{RECIPE}-{num_bytes // 1024}k-python{platform.python_version()}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05d}.jsonl" for index in range(first, first + count)]
    for index, path in enumerate(paths, start=first):
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(_content(index, num_bytes), encoding="utf-8")
            partial.replace(path)
    return paths


def open_files(files: list[Path]) -> CorpusSource:
    """The corpus these files make."""
    return open_corpus(CorpusConfig(paths=[str(path) for path in files]))


@functools.cache
def _sources() -> list[str]:
    items = read_corpus(open_corpus(standard_library_corpus()))
    return [item.text for item in items if isinstance(item, Document)]


def _content(index: int, file_bytes: int) -> str:
    rng = random.Random(index)
    rows, num_bytes = [], 0
    while num_bytes < file_bytes:
        lines = rng.choice(_sources()).splitlines(keepends=True)
        rng.shuffle(lines)
        text = "".join(lines)[: min(MAX_DOCUMENT_CHARACTERS, file_bytes - num_bytes)]
        if text.strip():
            rows.append(json.dumps({"text": text}))
            num_bytes += len(text.encode())
    return "\n".join(rows) + "\n"
