"""The benchmark: one registry of contenders, one runner, CSV out, plots from the CSV (book, chapter 13)."""
