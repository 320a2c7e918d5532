"""Losses that let a classifier guess k times: exact, fast, on any device."""

from topk.functional import (
    class_margins,
    differentiable_topk_loss,
    focal_loss,
    ldam_loss,
    smooth_topk_loss,
    topk_hinge_loss,
    transition_topk_loss,
)
from topk.version import __version__

__all__ = [
    "__version__",
    "class_margins",
    "differentiable_topk_loss",
    "focal_loss",
    "ldam_loss",
    "smooth_topk_loss",
    "topk_hinge_loss",
    "transition_topk_loss",
]
