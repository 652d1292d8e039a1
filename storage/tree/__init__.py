"""One context on disk: a SQLite catalogue that is also the journal, and sealed Zarr segments.

Start with `writer.py` and `reader.py`; nothing here knows of searching, branches' operations or other contexts.
"""
