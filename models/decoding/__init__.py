"""Decoding over a Working Context: what the model keeps between tokens, and how the next one is drawn."""
