"""The top-k transition loss after Sawada, Kaneko and Sagi (2020), as reconstructed in the book (chapter 5).

With p = softmax(x), T the k classes of largest score and CE = -log p_y, smoothed if asked for,

    loss = (1 - a) CE + a G,        G = -log sum_{j in T} p_j if y is in T, else -log p_y.

The weight a carries no gradient. It comes from outside, or is read off the lead of y over the (k+1)-th score:

    a = s^2 (3 - 2 s),        s = clip((x_y - x_[k+1]) / width, 0, 1).

With S the sum of p over T, h = a if y is in T and 0 if not, and e the smoothing over n classes, this is

    loss = -(1 - h - e (1 - a)) log p_y - h log S - e (1 - a) mean of log p,
    slope_j = p_j - h [j in T] p_j / S - (1 - h - e (1 - a)) [j = y] - e (1 - a) / n.

So backward is one softmax with corrections on k + 1 classes, which forward has worked out. Several k share one
selection. Rows with something that is not finite are rare: their loss gives them away, and they are mended.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topk._cpu import CHUNK, buffers, chunks, ordered_and_next
from topk.arguments import KArgument, check_choice, check_ignore_index, check_k, check_number, check_scores
from topk.autograd import Head, Loss, compute_dtype
from topk.losses.common import (
    LossModule,
    PendingScores,
    as_rows,
    largest_classes,
    reduced_loss,
    target_scores,
    with_tail,
)
from topk.losses.soft import takes_probabilities
from topk.metrics import ranks
from topk.tails import PowerSums, SumAndMean

Transition = str | float | Tensor | Callable[[Tensor], Tensor]


class Options(NamedTuple):
    """The arguments of the loss, besides those that every loss takes and the weight a, which is a tensor."""

    ks: list[int]
    weights: list[float]  # of the ks
    width: float
    label_smoothing: float


def definition(
    scores: Tensor,  # (rows, classes)
    target: Tensor,  # (rows,)
    a: Tensor | None = None,  # (rows,), or None: from the margin
    *,
    k: int,
    width: float = 10.0,
    label_smoothing: float = 0.0,
    tail: Tensor | None = None,  # over classes that are not listed: the sum of exp(x), or that, of x, and their number
) -> Tensor:
    """The loss of every row (rows,); a and the choice of T are constants to every derivative."""
    best = largest_classes(scores, k + 1)
    if a is None:
        margin = target_scores(scores, target) - target_scores(scores, best[:, k])
        a = smoothstep(margin.detach() / width)
    log_total = with_tail(scores.logsumexp(1), tail)
    log_p = scores.log_softmax(1) if tail is None else scores - log_total[:, None]
    missed = -target_scores(log_p, target)
    entropy = missed
    if label_smoothing > 0.0:
        possible = scores > -torch.inf
        total, count = torch.where(possible, log_p, 0.0).sum(1), possible.sum(1)
        if tail is not None:
            total, count = total + tail[1] - tail[2] * log_total, count + tail[2]
        mean = total / count
        entropy = (1.0 - label_smoothing) * missed - label_smoothing * mean
    top = best[:, :k]
    hit = (top == target[:, None]).any(1)
    grouped = torch.where(hit, -log_p.gather(1, top).logsumexp(1), missed)
    return (1.0 - a) * entropy + a * grouped


def smoothstep(s: Tensor) -> Tensor:
    """s^2 (3 - 2 s), with s clipped to [0, 1]."""
    s = s.clamp(0.0, 1.0)
    return s * s * torch.rsub(s, 3.0, alpha=2.0)


def margins(scores: Tensor, target: Tensor, ks: list[int]) -> Tensor:
    """x_y - x_[k+1] (rows, number of ks); +inf where there is no (k+1)-th score, -inf where y is impossible."""
    own = target_scores(scores, target)[:, None]
    lead = _lead(own, scores.topk(ks[-1] + 1, dim=1).values, ks)
    return lead.masked_fill(own == -torch.inf, -torch.inf)


def _lead(own: Tensor, values: Tensor, ks: list[int]) -> Tensor:
    return own - (values[:, ks[0] : ks[0] + 1] if len(ks) == 1 else torch.stack([values[:, k] for k in ks], 1))


def forward(scores: Tensor, target: Tensor, options: Options, *given: Tensor) -> tuple[Tensor, ...]:
    """loss (rows,), the indices of T and y, the corrections of p there (rows, k + 1), two flags (rows, 2).

    The flags are what smoothing takes off every possible class, and 1 for a row without any. `given`: the weights a
    (rows, ks), if they do not come from the margins.
    """
    ks, weights, width, smoothing = options
    log_p = _log_probabilities(scores, smoothing > 0.0)  # first: while it computes, the scores come into the cache
    values, top = ordered_and_next(scores, ks[-1])
    x_target = scores.gather(1, target[:, None])
    if given:
        a = _checked(given[0])
        grouped = a * torch.stack([(top[:, :k] == target[:, None]).any(1) for k in ks], 1)
    else:  # who leads the (k+1)-th score is among the k; -inf minus -inf: an impossible y leads nobody
        a = grouped = smoothstep(_lead(x_target, values, ks) / width).nan_to_num_()
    places = torch.cat((top, target[:, None]), 1)
    best = _in_parts(scores, places) if log_p is None else log_p.gather(1, places)
    loss, corrections = _without_smoothing(best, grouped, options)
    flags, at_target = loss.new_zeros((len(loss), 2)), corrections[:, -1:]
    if smoothing > 0.0 and log_p is not None:
        taken = smoothing * (sum(weights) - a @ a.new_tensor(weights)[:, None])
        mean, count = _mean_of_possible(log_p, scores)
        loss -= taken * mean.masked_fill(taken == 0.0, 0.0)
        at_target += taken
        flags[:, :1] = taken / count
    whole = torch.addcmul(loss, at_target, best[:, -1:])
    if not (scores.is_cpu and math.isfinite(float(whole.sum()))):
        # Where G alone is left, log p_y does not matter, even if it is beyond float32.
        whole = torch.where((at_target == 0.0) & (x_target > -torch.inf), loss, whole)
        whole = _mended(whole, corrections, flags, values[:, :1], x_target)
    return whole.squeeze(1), places, corrections, flags


def _log_probabilities(scores: Tensor, everywhere: bool) -> Tensor | None:
    """log p, in a work space if that has room, since new memory is slow; None if it has not, unless `everywhere`."""
    if everywhere or not scores.is_cpu:
        return scores.log_softmax(1)
    return torch.log_softmax(scores, 1, out=buffers(scores, 1)[0]) if 0 < scores.numel() <= CHUNK else None


def _in_parts(scores: Tensor, places: Tensor) -> Tensor:
    """log p at `places`, through a work space."""
    (buffer,) = buffers(scores, 1)
    best = torch.empty_like(places, dtype=scores.dtype)
    for part in chunks(scores):
        log_p = torch.log_softmax(scores[part], 1, out=buffer[: part.stop - part.start])
        torch.gather(log_p, 1, places[part], out=best[part])
    return best


def _mean_of_possible(log_p: Tensor, scores: Tensor) -> tuple[Tensor, Tensor | int]:
    """The mean of log p over the classes that are not masked by -inf, and their number; spoils `log_p`."""
    total = log_p.sum(1, keepdim=True)
    if log_p.is_cpu and math.isfinite(float(total.sum())):
        return total / log_p.shape[1], log_p.shape[1]
    masked = scores == -torch.inf
    total = log_p.masked_fill_(masked, 0.0).sum(1, keepdim=True)
    count = log_p.copy_(~masked).sum(1, keepdim=True)  # counted here, since the sum of a mask makes it an int64 first
    return total / count, count


def _checked(a: Tensor) -> Tensor:
    """The weights a that came from outside."""
    if a.is_cpu and bool(((a < 0.0) | (a > 1.0)).any()):
        low, high = map(float, a.aminmax())
        raise ValueError(f"transition must give weights from 0 to 1, got values from {low:g} to {high:g}")
    return a


def _without_smoothing(log_p: Tensor, grouped: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """-h log S (rows, 1), and what has to be added to p on T and y (rows, k + 1), but for the smoothing."""
    ks, weights, _, _ = options
    p = log_p[:, :-1].exp()
    if len(ks) == 1:
        share, group = grouped * -weights[0], p.sum(1, keepdim=True)
        slopes = share / group
        loss, taken = share * group.log(), share
    else:
        share, group = grouped * grouped.new_tensor(weights).neg_(), p.cumsum(1)[:, [k - 1 for k in ks]]
        loss, taken = (share * group.log()).sum(1, keepdim=True), share.sum(1, keepdim=True)
        # The j-th largest score belongs to the groups of all k >= j.
        slopes = (share / group).flip(1).cumsum(1).flip(1)[:, [bisect_right(ks, j) for j in range(ks[-1])]]
    return loss, torch.cat((slopes * p, torch.rsub(taken, -sum(weights))), 1)


def _mended(loss: Tensor, corrections: Tensor, flags: Tensor, largest: Tensor, x_target: Tensor) -> Tensor:
    """The loss with NaN in bad rows and +inf where y is impossible, whose gradient is p alone."""
    impossible, dead = x_target == -torch.inf, largest == -torch.inf
    corrections.masked_fill_(impossible, 0.0)
    flags[:, :1].masked_fill_(dead, 0.0)
    flags[:, 1:].masked_fill_(dead, 1.0)
    return loss.masked_fill(impossible, torch.inf).masked_fill(~(largest < torch.inf), torch.nan)


def backward(
    grad: Tensor,  # (rows,)
    scores: Tensor,
    target: Tensor,
    options: Options,
    saved: tuple[Tensor, ...],
    *_: Tensor,
) -> Tensor:
    """grad * d loss / d scores: softmax, corrected on T and y."""
    places, corrections, flags = saved
    total = sum(options.weights)
    result = scores.softmax(1).mul_((grad if total == 1.0 else grad * total)[:, None])
    if options.label_smoothing > 0.0:
        result.sub_(grad[:, None] * flags[:, :1]).masked_fill_(scores == -torch.inf, 0.0)
    result.scatter_add_(1, places, grad[:, None] * corrections)
    dead = flags[:, 1]
    return result if scores.is_cpu and not bool(dead.any()) else result.masked_fill_(dead[:, None] > 0.0, 0.0)


def head(options: Options) -> Head:
    """One sum of exponentials; smoothing wants the mean score as well."""
    return Head(options.ks[-1] + 1, [SumAndMean() if options.label_smoothing > 0.0 else PowerSums(1.0)])


LOSS = Loss("transition", Options, definition, forward, backward, head=head)


def expected(
    scores: Tensor,  # (rows, classes)
    q: Tensor,  # (rows, classes), probabilities
    *,
    k: KArgument = 5,
    transition: Transition = "margin",
    width: float = 10.0,
    label_smoothing: float = 0.0,
    **_: Any,
) -> Tensor | None:
    """sum over y of q_y times the loss (rows,), for all y at once."""
    if not isinstance(transition, str | float | int) or transition == "accuracy":
        return None
    loss, log_p = torch.zeros_like(scores[:, 0]), scores.log_softmax(1)
    missed = torch.where(q != 0.0, -log_p, 0.0)
    possible = scores > -torch.inf
    mean = torch.where(possible, log_p, 0.0).sum(1, keepdim=True) / possible.sum(1, keepdim=True)
    for each, share in zip(*check_k(k, scores.shape[1]), strict=True):
        if each == scores.shape[1] or share == 0.0:
            continue
        best = largest_classes(scores, each + 1)
        top, following = best[:, :-1], scores.gather(1, best[:, -1:])
        lead = (scores - following).nan_to_num(nan=0.0).detach()
        a = smoothstep(lead / width) if transition == "margin" else torch.full_like(scores, float(transition))
        group = -log_p.gather(1, top).logsumexp(1, keepdim=True)
        grouped = missed.scatter(1, top, group.expand(top.shape))
        entropy = (1.0 - label_smoothing) * missed - label_smoothing * mean
        loss = loss + share * (q * ((1.0 - a) * entropy + a * grouped)).sum(1)
    return loss


@functools.partial(takes_probabilities, expected=expected)
def transition_topk_loss(
    scores: Tensor,
    target: Tensor,
    k: KArgument = 5,
    *,
    transition: Transition = "margin",
    width: float = 10.0,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    r"""The top-k transition loss after Sawada, Kaneko and Sagi (2020), as the book reconstructs it; chapter 5.

    With p = softmax(scores), CE = -log p_y and T the k classes of largest score (of equals the lower index),

    .. math:: \ell = (1 - a)\,\mathrm{CE} + a\,G, \qquad G = -\log \textstyle\sum_{j \in T} p_j
        \text{ if } y \in T, \text{ else } -\log p_y.

    The weight a carries no gradient, so unless it is fixed the gradient is not that of the printed value.

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices, or probabilities in the shape of scores: the expected loss.
        k: the number of guesses, or a mapping ``{k: weight}`` whose weights sum to 1.
        transition: how a is found.
            "margin": per example s^2 (3 - 2 s) with s = clip((x_y - x_[k+1]) / width, 0, 1);
            a number from 0 to 1, or a tensor that holds one, or one for every k: fixed;
            a callable: it gets the detached margins x_y - x_[k+1] in the shape of ``target``, +inf where there is
            no (k+1)-th score, once for every k of weight > 0, and returns a from 0 to 1 in the same shape. Values
            outside raise on the CPU; a NaN makes its row's loss NaN.
            "accuracy" needs memory of what came before: only ``TransitionTopKLoss`` has it.
        width: the lead over the (k+1)-th score at which "margin" has moved over to G, > 0. The default suits the
            logits of trained heads (chapter 19); the narrower, the earlier the first guess is given up.
        label_smoothing: as in ``F.cross_entropy``, in CE alone, and spread over the classes that are not masked by
            -inf; G stays as it is.
        weight: a number for every class, or None. The row's whole loss is multiplied by its target's, the smoothing
            included, where ``F.cross_entropy`` takes every class's own weight in the smoothing.
        ignore_index: rows with this target give 0 and no gradient.
        reduction: "mean", "sum" or "none".
        backend: None (choose), "torch", "compiled" or "triton".
    """
    ks, weights = check_k(k, check_scores(scores, target))
    width = check_number("width", width, above=0.0)
    label_smoothing = check_number("label_smoothing", label_smoothing, least=0.0, most=1.0)
    options = Options(ks, weights, width, label_smoothing)
    given = _given_weights(transition, scores, target, options, check_ignore_index(ignore_index))
    tail = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction, "backend": backend}
    return reduced_loss(LOSS, options, scores, target, *given, **tail)


def _given_weights(
    transition: Transition, scores: Tensor, target: Tensor, options: Options, ignore_index: int
) -> tuple[Tensor, ...]:
    """The weight a of every row and k; nothing where the margins decide."""
    if isinstance(transition, str):
        if transition == "accuracy":
            raise ValueError(
                "transition='accuracy' follows a running accuracy, which only the module TransitionTopKLoss keeps; "
                "expected 'margin', a number, a tensor or a callable"
            )
        check_choice("transition", transition, ("margin", "accuracy"))
        return ()
    shape, dtype = (target.numel(), len(options.ks)), compute_dtype(scores)
    if isinstance(transition, Tensor):
        if tuple(transition.shape) not in ((), shape[1:]) or not transition.dtype.is_floating_point:
            raise ValueError(
                f"transition as a tensor must be floating-point with shape () or ({shape[1]},), one number a k, "
                f"got shape {tuple(transition.shape)} of {transition.dtype}"
            )
        return (transition.detach().to(scores.device, dtype).expand(shape),)
    if callable(transition):
        return (_called_weights(transition, scores, target, options, ignore_index),)
    a = check_number("transition", transition, least=0.0, most=1.0)
    return (torch.full(shape, a, dtype=dtype, device=scores.device),)


def _called_weights(
    transition: Callable[[Tensor], Tensor], scores: Tensor, target: Tensor, options: Options, ignore_index: int
) -> Tensor:
    """What `transition` makes of the margins, (rows, ks); 0 for a k that does not count, or a row without a class."""
    rows, flat = as_rows(scores, target)
    dtype, classes = compute_dtype(scores), rows.shape[1]
    used = (flat >= 0) & (flat < classes) & (flat != ignore_index)
    kept = [k for k, weight in zip(options.ks, options.weights, strict=True) if k < classes and weight > 0.0]
    columns = dict.fromkeys(options.ks, torch.zeros(flat.shape, dtype=dtype, device=scores.device))
    found = _margins(rows, torch.where(used, flat, 0), kept).unbind(1) if kept else ()
    for k, margin in zip(kept, found, strict=True):
        a = transition(margin.reshape(target.shape))
        if not isinstance(a, Tensor) or a.shape != target.shape:
            got = tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__
            raise ValueError(f"transition must return a tensor of the margins' shape {tuple(target.shape)}, got {got}")
        columns[k] = torch.where(used, a.detach().reshape(-1).to(dtype), 0.0)
    return torch.stack([columns[k] for k in options.ks], 1)


def _margins(scores: Tensor, target: Tensor, ks: list[int]) -> Tensor:
    """`margins` of scores that may be held in slices."""
    if not isinstance(scores, PendingScores):
        return margins(scores.detach().to(compute_dtype(scores)), target, ks)
    if scores.leading is None:
        raise ValueError("transition must not be a function of scores that are made in pieces, for it looks first")
    values, own = scores.leading(target, ks[-1] + 1)
    return _lead(own[:, None], values, ks).masked_fill(own[:, None] == -torch.inf, -torch.inf)


class TransitionTopKLoss(LossModule):
    """Module form of :func:`topk.transition_topk_loss`; it alone knows ``transition="accuracy"``.

    With that the weight of the grouped part follows the training top-k accuracy: ``running_accuracy``, one number a
    k, starts at 0 and moves by ``1 - momentum`` of the way to each training batch's accuracy, over all processes.
    """

    function = staticmethod(transition_topk_loss)
    running_accuracy: Tensor
    k: KArgument
    ignore_index: int
    momentum: float

    def __init__(
        self,
        k: KArgument = 5,
        *,
        transition: Transition = "margin",
        width: float = 10.0,
        label_smoothing: float = 0.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
        momentum: float = 0.99,
    ) -> None:
        super().__init__(locals())

    def _prepare(self) -> None:
        check_number("momentum", self.momentum, least=0.0, most=1.0)
        if isinstance(self.transition, str) and self.transition == "accuracy":
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.register_buffer("running_accuracy", torch.zeros(len(check_k(self.k)[0]), dtype=dtype))

    def _apply(self, *args: Any, **keywords: Any) -> TransitionTopKLoss:
        """As every module's, but the running accuracy is never a half type, in which its small steps would be lost."""
        before = self._buffers.get("running_accuracy")
        super()._apply(*args, **keywords)  # type: ignore[no-untyped-call]
        if before is not None and self.running_accuracy.dtype in (torch.float16, torch.bfloat16):
            self.running_accuracy = before.to(self.running_accuracy.device)
        return self

    def keywords(self) -> dict[str, Any]:
        """The keywords of the functional form: the running accuracy stands in for "accuracy"."""
        keywords = super().keywords()
        del keywords["momentum"]
        if "running_accuracy" in self._buffers:
            keywords["transition"] = self.running_accuracy
        return keywords

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """The loss of these scores; in training mode their accuracy is counted first."""
        if self.training and "running_accuracy" in self._buffers:
            self._count(scores, target)
        return super().forward(scores, target)

    @torch.no_grad()
    def _count(self, scores: Tensor, target: Tensor) -> None:
        rank = ranks(scores, target, ignore_index=self.ignore_index).reshape(-1)
        used = target.reshape(-1).to(torch.int64) != self.ignore_index
        hits = [((rank <= k) & used).sum() for k in check_k(self.k)[0]]
        counts = torch.stack((*hits, used.sum())).to(self.running_accuracy.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        step = torch.where(counts[-1] > 0, 1.0 - self.momentum, 0.0)
        accuracy = counts[:-1] / counts[-1].clamp(min=1)
        self.running_accuracy += step * (accuracy - self.running_accuracy)
