"""Bytes only: the MegaContext Tree on disk and in memory, and the readers of corpora.

Start with `contract.py` (what a tree promises), then `writer.py` and `reader.py` (how the one on disk keeps it).
"""
