"""The book's pipeline: text twins -> executed notebooks -> a strictly checked site. Run `python -m book.pipeline`."""
