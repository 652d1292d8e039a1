"""Corpora: files, folders, globs, JSON Lines, Parquet, Hugging Face datasets and packages as a stream of documents.

Start at `source.open_corpus`; `shard.Shard` is what a task reads; `quarantine.QuarantineTable` keeps what
could not become a document.
"""

from storage.corpus.document import CorpusItem, Document, QuarantinedItem, QuarantineReason
from storage.corpus.quarantine import QuarantineTable
from storage.corpus.shard import Shard, ShardLimits
from storage.corpus.source import CorpusSource, open_corpus, read_corpus
from storage.corpus.splits import Split, split_of
from storage.corpus.standard_library import standard_library_corpus

__all__ = [
    "CorpusItem",
    "CorpusSource",
    "Document",
    "QuarantineReason",
    "QuarantineTable",
    "QuarantinedItem",
    "Shard",
    "ShardLimits",
    "Split",
    "open_corpus",
    "read_corpus",
    "split_of",
    "standard_library_corpus",
]
