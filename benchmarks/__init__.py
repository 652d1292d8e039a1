"""Programs that print ratios against a named rival or floor, measured in the same run: `python -m benchmarks`.

`registry` lists them; `README.md` says what each one compares.
"""
