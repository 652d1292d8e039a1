"""Bytes only: the MegaContext Tree on disk and in memory, and the readers of corpora.

Start with `contract.py` (what a tree promises), then `tree/writer.py` and `tree/reader.py` (how the one on disk
keeps it).
"""
