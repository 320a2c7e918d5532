"""The subset distribution as one of torch's, and the loss of a set under it (book, chapter "Subsets").

Its shares and its normaliser are those of `topk.operators.subset`.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints, register_kl

from topk.arguments import REDUCTIONS, check_choice, check_ignore_index
from topk.autograd import is_traced
from topk.operators.rows import LOWEST, as_rows, check_k, check_scores, check_temperature, hard_mask, per_row
from topk.operators.subset import standardised, subset_mask
from topk.operators.threshold import threshold_mask


class _KHot(constraints.Constraint):
    """Vectors of zeros and exactly k ones."""

    is_discrete = True
    event_dim = 1

    def __init__(self, k: int) -> None:
        self.k = k
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return ((value == 0) | (value == 1)).all(-1) & (value.sum(-1) == self.k)


class KSubset(Distribution):
    r"""k of n elements at random, Pr[S] proportional to exp(sum over S of scores / temperature).

    A sample is a vector of zeros and k ones. Elements with a score of -inf are never in it.

    Args:
        scores: (..., n), any floating-point type; half types are computed in float32.
        k: how many, from 1 to n, and at most as many as there are finite scores.
        temperature: > 0, a number or a tensor that broadcasts to the batch shape.
        validate_args: as in every distribution of torch.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"scores": constraints.independent(constraints.real, 1)}
    has_rsample = True
    has_enumerate_support = True

    def __init__(
        self, scores: Tensor, k: int, temperature: float | Tensor = 1.0, validate_args: bool | None = None
    ) -> None:
        check_scores(scores, -1)
        check_k(k, scores.shape[-1], whole=True)
        check_temperature(temperature)
        self.scores, self.k = scores, k
        self.temperature = per_row("temperature", temperature, scores, -1).view(scores.shape[:-1])
        super().__init__(scores.shape[:-1], scores.shape[-1:], validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> KSubset:
        """The same distribution for a larger batch."""
        new: KSubset = self._get_checked_instance(KSubset, _instance)  # type: ignore[no-untyped-call]
        shape = torch.Size(batch_shape)
        new.scores, new.k = self.scores.expand(*shape, *self.event_shape), self.k
        new.temperature = self.temperature.expand(shape)
        super(KSubset, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Vectors of zeros and k ones."""
        return _KHot(self.k)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """pi and u (..., n), log e_k(exp u) (...)."""
        rows = as_rows(self.scores, -1)
        count = torch.full_like(rows[:, 0], self.k).to(torch.int64)
        temperature = self.temperature.reshape(-1)
        mask, total, pivot = subset_mask(rows, count, temperature, self.k, same=True)
        u = standardised(rows, pivot, temperature)
        return mask.view(self.scores.shape), u.view(self.scores.shape), total.view(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """The inclusion probabilities: the soft top-k mask of greatest entropy."""
        return self._parts()[0]

    @property
    def variance(self) -> Tensor:
        """Of every element's indicator."""
        mean = self.mean
        return mean * (1.0 - mean)

    @property
    def mode(self) -> Tensor:
        """The k largest scores, of equal ones those that come first."""
        return hard_mask(as_rows(self.scores, -1), self.k).view(self.scores.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log Pr of a set, as a vector of zeros and k ones."""
        if self._validate_args:
            self._validate_sample(value)
        _, u, total = self._parts()
        log_prob = torch.where(value != 0, u * value, 0.0).sum(-1) - total
        return torch.where(log_prob < LOWEST / 2, -torch.inf, log_prob)

    def entropy(self) -> Tensor:
        """log e_k - <mean, scores / temperature>."""
        mask, u, total = self._parts()
        return total - (mask * u).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Independent trials with sum P = k, tried again until k of them succeed: within a few tries, on average."""
        shape = self._extended_shape(torch.Size(sample_shape))
        rows = as_rows(self.scores, -1)
        chance = threshold_mask(rows, float(self.k), self.temperature.reshape(-1), "logistic")
        chance = chance.view(self.scores.shape).expand(shape).reshape(-1, shape[-1])
        mode = self.mode.expand(shape).reshape(-1, shape[-1])
        open_ended = ((chance > 0) & (chance < 1)).any(1) & (mode.sum(1) == self.k)
        result = mode + 0.0 * chance  # a NaN row stays one
        waiting = open_ended.nonzero()[:, 0]
        while len(waiting):
            drawn = torch.rand_like(chance[waiting]) < chance[waiting]
            fits = drawn.sum(1) == self.k
            result[waiting[fits]] = drawn[fits].to(result.dtype)
            waiting = waiting[~fits]
        return result.view(shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A sample with the gradient of the mean: the straight-through estimator of SIMPLE (Ahmed et al. 2023)."""
        mean = self.mean
        return self.sample(sample_shape) + (mean - mean.detach())

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All n choose k vectors (count, ..., n)."""
        n = self.event_shape[0]
        places = torch.tensor(list(itertools.combinations(range(n), self.k)), device=self.scores.device)
        values = torch.zeros(len(places), n, dtype=self.mode.dtype, device=self.scores.device)
        values = values.scatter_(1, places, 1.0).view(-1, *(1,) * len(self.batch_shape), n)
        return values.expand(-1, *self.batch_shape, n) if expand else values


@register_kl(KSubset, KSubset)  # type: ignore[untyped-decorator]
def _kl(p: KSubset, q: KSubset) -> Tensor:
    if p.event_shape != q.event_shape:
        raise ValueError(f"p and q must choose from as many elements, got {p.event_shape[0]} and {q.event_shape[0]}")
    mask, u, total = p._parts()
    if p.k != q.k:
        return torch.full_like(total, torch.inf)
    _, other, other_total = q._parts()
    divergence = (mask * (u - other)).sum(-1) - total + other_total
    return torch.where(divergence > -LOWEST / 2, torch.inf, divergence)


def subset_loss(
    scores: Tensor,
    khot: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int = -1,
    ignore_index: int = -100,
    reduction: str = "mean",
    largest_k: int | None = None,
) -> Tensor:
    r"""-log Pr[S = the given set] under ``KSubset``: a loss for targets of several right classes.

    With k the number of ones of the row and e_k the elementary symmetric polynomial,

    .. math:: \ell = \log e_k(e^{x / T}) - \sum_{i \in S} x_i / T,

    whose gradient is (mask - khot) / T, the mask being ``soft_topk(scores, k, temperature=T)``. A row without a one has
    loss 0, and so has one of ones only. k = 1 is cross-entropy.

    Args:
        scores: any shape and floating-point type; the loss of half types is computed and returned in float32.
        khot: zeros and ones of the same shape, any type. On the CPU anything else raises. On other devices, and where
            torch transforms or compiles the call, it makes its row NaN, as more ones than ``largest_k`` do.
        temperature: > 0, a number or a tensor that broadcasts to the scores without ``dim``.
        dim: where the classes are.
        ignore_index: a row with this value anywhere in ``khot`` gives 0 and no gradient, and the mean is without it.
        reduction: "mean", "sum" or "none".
        largest_k: an upper bound of k, so that nothing need look at ``khot``: on devices, and in torch.compile.
    """
    check_scores(scores, dim)
    if not isinstance(khot, Tensor) or khot.shape != scores.shape:
        got = tuple(khot.shape) if isinstance(khot, Tensor) else type(khot).__name__
        raise ValueError(f"khot must be a Tensor of the scores' shape {tuple(scores.shape)}, got {got}")
    check_temperature(temperature)
    check_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check_ignore_index(ignore_index)
    rows, given = as_rows(scores, dim), khot.movedim(dim, -1).reshape(-1, scores.shape[dim])
    ignored = (given == ignore_index).any(1)
    chosen = (given != 0) & ~ignored[:, None]
    neither = chosen & (given != 1)
    wrong, counts = neither.any(1), chosen.sum(1)
    if largest_k is not None:
        check_k(largest_k, scores.shape[dim], whole=True)
        wrong = wrong | (counts > largest_k)
    if _may_look(khot) and bool(wrong.any()):
        if bool(neither.any()):
            found = given[neither][0].item()
            raise ValueError(
                f"khot must hold zeros and ones, or ignore_index={ignore_index} in rows to leave out, got {found:g}"
            )
        raise ValueError(
            f"largest_k must be at least the number of ones of every row, {int(counts.max())}, got {largest_k}"
        )
    if largest_k is None:
        largest_k = max(1, int(counts.max())) if len(counts) else 1
    rows = torch.where(ignored[:, None], 0.0, rows)
    scale = per_row("temperature", temperature, scores, dim)
    _, total, pivot = subset_mask(rows, counts.clamp(max=largest_k), scale, largest_k)
    u = standardised(rows, pivot, scale)
    lost = (chosen & (rows == -torch.inf)).any(1)
    loss = torch.where(lost, torch.inf, total - torch.where(chosen, u, 0.0).sum(1))
    loss = loss * torch.where(wrong, torch.nan, 1.0)  # and so its gradient
    if reduction == "none":
        return loss.view(scores.movedim(dim, -1).shape[:-1])
    return loss.sum() if reduction == "sum" else loss.sum() / (~ignored).sum()


def _may_look(values: Tensor) -> bool:
    """Whether numbers can be looked at without waiting for a device, or for whoever records the operations."""
    if is_traced(values) or not values.is_cpu:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(values)
