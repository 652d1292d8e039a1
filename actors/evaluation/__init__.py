"""Measuring what a memory is worth: the parts of an evaluation that need both models and trees."""
