"""Losses that let a classifier guess k times: exact, fast, on any device."""

from topk import metrics
from topk.functional import (
    noised_topk_loss,
)
from topk.losses.differentiable import DifferentiableTopKLoss, differentiable_topk_loss
from topk.losses.hinge import TopKHingeLoss, topk_hinge_loss
from topk.losses.imbalance import FocalLoss, LDAMLoss, class_margins, focal_loss, ldam_loss
from topk.losses.smooth import SmoothTopKLoss, smooth_topk_loss
from topk.losses.transition import TransitionTopKLoss, transition_topk_loss
from topk.modules import (
    NoisedTopKLoss,
)
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
    "smooth_topk_loss",
    "topk_hinge_loss",
    "transition_topk_loss",
]
