"""Losses that train what stands before a frozen language model. Tensors only: no data, no optimiser, no Ray."""
