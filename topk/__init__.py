"""Losses that let a classifier guess k times: exact, fast, on any device."""

from topk import metrics, operators
from topk.functional import (
    class_margins,
    differentiable_topk_loss,
    focal_loss,
    ldam_loss,
    noised_topk_loss,
    smooth_topk_loss,
    topk_hinge_loss,
    transition_topk_loss,
)
from topk.modules import (
    DifferentiableTopKLoss,
    FocalLoss,
    LDAMLoss,
    NoisedTopKLoss,
    SmoothTopKLoss,
    TopKHingeLoss,
    TransitionTopKLoss,
)
from topk.operators import soft_topk, subset_loss
from topk.version import __version__

__all__ = [
    "DifferentiableTopKLoss",
    "FocalLoss",
    "LDAMLoss",
    "NoisedTopKLoss",
    "SmoothTopKLoss",
    "TopKHingeLoss",
    "TransitionTopKLoss",
    "__version__",
    "class_margins",
    "differentiable_topk_loss",
    "focal_loss",
    "ldam_loss",
    "metrics",
    "noised_topk_loss",
    "operators",
    "smooth_topk_loss",
    "soft_topk",
    "subset_loss",
    "topk_hinge_loss",
    "transition_topk_loss",
]
