"""The book's experiments, figures and sentences: everything its chapters use beside `topk` itself."""
