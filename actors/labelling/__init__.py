"""Labels for LensNet: what edits of real Working Contexts were worth, seen from behind."""
