"""Curation: what of a memory is used, what a policy makes of that, and how it is done without getting in the way."""
