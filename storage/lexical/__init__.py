"""Lexical search over the blocks of a context: an index behind the commits, and what it does not hold yet."""
