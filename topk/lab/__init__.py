"""The laboratory: what the book's chapters and experiments share beyond the losses (extra `lab`)."""
