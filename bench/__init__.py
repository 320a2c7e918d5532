"""The benchmark: one registry of contenders, one runner, CSV out, one table of them (book, chapter 13)."""
