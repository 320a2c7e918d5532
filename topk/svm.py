r"""Drop-in for the package smooth-topk (Berrada, Zisserman and Kumar 2018), which installs as `topk` too (chapter 6).

Same import, class names, constructor arguments, attributes and state dict, so code and checkpoints made with that
package go on working:

    from topk.svm import SmoothTop1SVM
    loss_fn = SmoothTop1SVM(n_classes=2)
    loss = loss_fn(logits, labels)  # the mean over the batch

Differences, all of them wider than before: the modules work on any device (also when the scores are elsewhere than
the module), in every floating-point type, for k up to n_classes, under torch.compile; they pickle; setting `tau`
prints nothing. As the package did, the smooth ones give 0 for an empty batch.

One difference in values. Where the gap between the k-th and the (k+1)-th largest score is at least k tau log(thresh),
the package leaves the smooth loss for the hard one, to keep its polynomials from overflowing. Ours cannot overflow: the
smooth loss is used throughout and `thresh` has no effect. With n classes, `smooth - hard` behind such a gap lies

* where y is among the k largest, in [0, tau log(1 + (n - k) exp(alpha / tau) / thresh)] as long as
  alpha <= tau log(thresh) (the hard loss is 0), and within tau log(max(k, n - k + 1)) of 0 for any alpha;
* where y is not, in [-tau log k, tau log(1 + (n - k) / thresh)]: the hard loss ignores ties among the k largest.

So the difference is next to nothing for k = 1 and few classes, and for a small tau; for others the package's loss
jumps there, and ours does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from topk.arguments import KArgument, check_count, check_k, check_number, check_scores
from topk.losses.hinge import topk_hinge_loss
from topk.losses.smooth import smooth_topk_loss

__all__ = ["MaxTop1SVM", "MaxTopkSVM", "SmoothTop1SVM", "SmoothTopkSVM"]


class _SVMLoss(nn.Module):
    """What the four losses share: the number of classes, the margin `alpha`, `tau` and the buffer `labels`."""

    labels: Tensor
    k: KArgument = 1

    def __init__(self, n_classes: int, alpha: float | None) -> None:
        super().__init__()
        self.n_classes = check_count("n_classes", n_classes)
        self.alpha = 1.0 if alpha is None else check_number("alpha", alpha, least=0.0)
        self._tau: float | None = None
        # Not needed here; kept because checkpoints made with the package hold it.
        self.register_buffer("labels", torch.arange(self.n_classes))

    @property
    def tau(self) -> float | None:
        """The temperature; may be set at any time (under torch.compile each new value compiles again)."""
        return self._tau

    @tau.setter
    def tau(self, tau: float) -> None:
        self._tau = check_number("tau", tau, above=0.0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of the scores `x` for the class indices `y`; 0 for an empty batch."""
        classes = check_scores(x, y)
        if classes != self.n_classes:
            raise ValueError(
                f"scores must have n_classes = {self.n_classes} classes, got {classes} (shape {tuple(x.shape)})"
            )
        return self._loss(x, y, "mean" if y.numel() else "sum")

    def _loss(self, x: Tensor, y: Tensor, reduction: str) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The constructor's arguments as they stand now."""
        shown = {"n_classes": self.n_classes, "alpha": self.alpha, "tau": self.tau, "k": self.k}
        if "k" not in self.__dict__:
            del shown["k"]
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value is not None)


class _SmoothSVM(_SVMLoss):
    thresh = 1e3

    def _loss(self, x: Tensor, y: Tensor, reduction: str) -> Tensor:
        assert self._tau is not None
        return smooth_topk_loss(x, y, self.k, tau=self._tau, margin=self.alpha, reduction=reduction)


class _HardSVM(_SVMLoss):
    def _loss(self, x: Tensor, y: Tensor, reduction: str) -> Tensor:
        return topk_hinge_loss(x, y, self.k, variant="smooth_limit", margin=self.alpha, reduction=reduction)


class MaxTop1SVM(_HardSVM):
    """The multi-class hinge loss: the largest of x_j + alpha [j != y], minus x_y."""

    def __init__(self, n_classes: int, alpha: float | None = None) -> None:
        super().__init__(n_classes, alpha)


class MaxTopkSVM(_HardSVM):
    """The top-k hinge loss max(0, alpha + (k-th largest wrong score - x_y) / k)."""

    def __init__(self, n_classes: int, alpha: float | None = None, k: KArgument = 5) -> None:
        super().__init__(n_classes, alpha)
        check_k(k, self.n_classes)
        self.k = k


class SmoothTop1SVM(_SmoothSVM):
    """The smooth multi-class SVM: tau log(sum of exp((x_j + alpha [j != y] - x_y) / tau))."""

    def __init__(self, n_classes: int, alpha: float | None = None, tau: float = 1.0) -> None:
        super().__init__(n_classes, alpha)
        self.tau = tau


class SmoothTopkSVM(_SmoothSVM):
    """The smooth top-k SVM, :func:`topk.smooth_topk_loss` with `margin=alpha`."""

    def __init__(self, n_classes: int, alpha: float | None = None, tau: float = 1.0, k: KArgument = 5) -> None:
        super().__init__(n_classes, alpha)
        check_k(k, self.n_classes)
        self.k = k
        self.tau = tau
