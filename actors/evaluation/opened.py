"""A context as workers that measure on it open it: at one version, with its words."""

from __future__ import annotations

from cluster.config import StoreConfig
from models.tokenizer import Tokenizer
from storage.contract import TreeReader
from storage.lexical.search import LexicalSearcher
from storage.store import Store


def open_searchable(store: StoreConfig, seq: int, tokenizer: Tokenizer) -> tuple[TreeReader, LexicalSearcher]:
    """The context's reader and its lexical index.

    Args:
        store: which context.
        seq: its version, so that all workers read the same.
        tokenizer: of its tokens.

    Raises:
        StorageError: there is no such context or version.
    """
    opened = Store(store.root)
    return (
        opened.open_reader(store.context, seq=seq),
        LexicalSearcher(opened.folder(store.context), tokenizer.decode_batch),
    )
