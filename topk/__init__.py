"""Losses that let a classifier guess k times: exact, fast, on any device."""

from topk import metrics as metrics
from topk import operators as operators
from topk.linear import LinearTopKLoss as LinearTopKLoss
from topk.linear import linear_loss as linear_loss
from topk.losses.differentiable import DifferentiableTopKLoss as DifferentiableTopKLoss
from topk.losses.differentiable import differentiable_topk_loss as differentiable_topk_loss
from topk.losses.hinge import TopKHingeLoss as TopKHingeLoss
from topk.losses.hinge import topk_hinge_loss as topk_hinge_loss
from topk.losses.imbalance import FocalLoss as FocalLoss
from topk.losses.imbalance import LDAMLoss as LDAMLoss
from topk.losses.imbalance import class_margins as class_margins
from topk.losses.imbalance import focal_loss as focal_loss
from topk.losses.imbalance import ldam_loss as ldam_loss
from topk.losses.noised import NoisedTopKLoss as NoisedTopKLoss
from topk.losses.noised import noised_topk_loss as noised_topk_loss
from topk.losses.ranking import AUTKCLoss as AUTKCLoss
from topk.losses.ranking import LDRLoss as LDRLoss
from topk.losses.ranking import SoftmaxAtKLoss as SoftmaxAtKLoss
from topk.losses.ranking import autkc_loss as autkc_loss
from topk.losses.ranking import ldr_loss as ldr_loss
from topk.losses.ranking import softmax_at_k_loss as softmax_at_k_loss
from topk.losses.smooth import SmoothTopKLoss as SmoothTopKLoss
from topk.losses.smooth import smooth_topk_loss as smooth_topk_loss
from topk.losses.transition import TransitionTopKLoss as TransitionTopKLoss
from topk.losses.transition import transition_topk_loss as transition_topk_loss
from topk.operators import soft_topk as soft_topk
from topk.operators import subset_loss as subset_loss
from topk.shards import ClassShard as ClassShard
from topk.shards import sharded_loss as sharded_loss
from topk.version import __version__ as __version__

_OTHERS = ("ClassShard", "__version__", "class_margins", "metrics", "operators", "soft_topk")
__all__ = [*_OTHERS, *(name for name in dir() if name.lower().endswith("loss"))]
