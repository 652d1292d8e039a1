"""What sessions and label jobs write down of Working Contexts: focus events and focus labels, as Parquet."""
