"""Thin Ray hosts around plain classes, and the stages a block of tokens passes through.

packing (documents to windows) -> compactor (windows to gists) -> tree_store (the one writer) -> follower (levels
above). `feeds` connects them, through plain actors or through Ray Data.
"""
