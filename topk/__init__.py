"""Losses that let a classifier guess k times: exact, fast, on any device."""

from topk.functional import smooth_topk_loss

from topk.version import __version__
__all__ = ["smooth_topk_loss"]
