"""Classes spread over processes: each holds the scores of a slice of them (book, chapter "A million classes").

A loss looks at a row's *head*, its few largest scores and the target's, and at the other classes, its *tail*, through
sums of powers of exp(rate (x - shift)) alone. So with P slices

1. every process sends the `depth` largest scores of its slice, with their classes, and the target's score: one
   all_gather, after which all know the row's head, of equals the lower class first;
2. the sums over the slices' tails are added: one all_reduce of a few numbers a row, or none where a loss has no tail;
3. every process computes the loss of (head, sums) with the loss's own definition, and its slopes in both; from these
   the gradient of its slice follows without a message: a polynomial in exp(rate (x - shift)), and the head's slopes.

Rows, targets, weights and margins are the same on all processes; a target, a weight or a margin counts in all classes.
A row whose target is masked (-inf) has the loss +inf, and here no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from topk._cpu import buffers, chunks, exponentials, exponents, ordered_topk
from topk.arguments import check_count, check_targets
from topk.autograd import Call, Tail, compute_dtype, settled
from topk.losses.common import PendingScores, finite_or_zero, row_dtype

_MESSAGES = {torch.float32: torch.int32, torch.float64: torch.int64}  # scores travel as bits, beside class numbers


@dataclass(frozen=True)
class ClassShard:
    """Which of all `total` classes this process holds: those from `start` on; `group` of torch.distributed, or None.

    The slices of a group's processes follow one another in any order; they may differ in size, and be empty.
    """

    start: int
    total: int
    group: Any = None

    def __post_init__(self) -> None:
        check_count("total", self.total)
        if check_count("start", self.start, least=0) > self.total:
            raise ValueError(f"start must be at most total, {self.total}, got {self.start}")

    def check(self, name: str, classes: int) -> None:
        """Raises unless so many classes fit from `start` on."""
        if self.start + classes > self.total:
            raise ValueError(
                f"{name} must end by class {self.total}, the total, got {classes} classes from {self.start} on"
            )

    @property
    def processes(self) -> int:
        """How many share the classes."""
        return int(torch.distributed.get_world_size(self.group))

    def gathered(self, message: Tensor) -> list[Tensor]:
        """Every process's message."""
        found = [torch.zeros_like(message) for _ in range(self.processes)]
        torch.distributed.all_gather(found, message.contiguous(), group=self.group)
        return found

    def added(self, numbers: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        torch.distributed.all_reduce(numbers, group=self.group)
        return numbers


def sharded_loss(loss: nn.Module, scores: Tensor, target: Tensor, shard: ClassShard) -> Tensor:
    """``loss(scores of all classes, target)`` from this process's slice of them; the gradient is that of the slice.

    A DTensor with the placement Shard(1) may be given to a loss itself.

    Args:
        loss: a loss module of this package. Hinges and transition, LDAM, focal and differentiable (but for a softmax
            over all scores or smoothed labels), smooth with k <= 8, noised without noise.
        scores: (rows, classes of the slice).
        target: (rows,), class indices among all classes, or (rows, all classes), probabilities with few above 0.
        shard: which classes these are.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must have shape (rows, classes of the slice), got {tuple(scores.shape)}")
    shard.check("scores", scores.shape[1])
    value: Tensor = loss(_pending(scores, shard), target)
    return value


def of_dtensor(scores: Any) -> PendingScores:
    """Stands in for a DTensor that is cut along its classes."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if scores.dim() != 2 or tuple(scores.placements) not in ((Shard(1),), (Shard(-1),)):
        raise ValueError(f"scores as a DTensor must be (rows, classes) with Shard(1), got {scores.placements}")
    offset = compute_local_shape_and_global_offset(scores.shape, scores.device_mesh, scores.placements)[1]
    shard = ClassShard(min(int(offset[1]), scores.shape[1]), int(scores.shape[1]), scores.device_mesh.get_group())
    return _pending(scores.to_local(), shard)


def _pending(scores: Tensor, shard: ClassShard) -> PendingScores:
    def source(call: Call, target: Tensor, tensors: tuple[Tensor, ...], share: Tensor | None, reduction: str) -> Tensor:
        value: Tensor = SlicedRowLoss.apply(call, shard, scores, target, *tensors)
        return value if share is None else torch.where(share == 0.0, 0.0, value * share)

    def chosen(rows: Tensor) -> PendingScores:
        return _pending(scores[rows], shard)

    return PendingScores.of(scores, scores.shape[0], shard.total, scores.dtype, source, chosen)


class SlicedRowLoss(torch.autograd.Function):
    """The loss of every row. Inputs: call, shard, the slice's scores, target, *tensors."""

    @staticmethod
    def forward(ctx: Any, call: Call, shard: ClassShard, scores: Tensor, target: Tensor, *tensors: Tensor) -> Tensor:
        loss, *saved = sliced_values(call, shard, scores, target, tensors)
        ctx.call, ctx.tensors = call, len(tensors)
        ctx.save_for_backward(scores, *saved)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, *saved = ctx.saved_tensors
        gradient = sliced_gradient(ctx.call, grad, scores, saved)
        return None, None, gradient.to(scores.dtype), None, *([None] * ctx.tensors)


def sliced_values(
    call: Call, shard: ClassShard, scores: Tensor, target: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The loss of every row, the head's places in the slice and slopes (rows, head), for each tail a shift and slopes.

    A place beyond the slice says that another process has the class.
    """
    if call.loss.head is None:
        raise ValueError(f"loss must have a form for sharded classes, which {call.loss.name} has not")
    depth, tails = call.loss.head(call.options)
    rows, state = scores.to(compute_dtype(scores)), check_targets(target, shard.total, call.ignore_index)[0]
    values, classes, own = _head(rows, state.clamp(min=0), min(depth, shard.total), shard)
    local = classes - shard.start
    places = torch.where((local >= 0) & (local < rows.shape[1]), local, rows.shape[1])
    shifts = [_shift(values, own, tail).to(rows.dtype) for tail in tails]
    sums = [_power_sums(rows, places, shift, tail) for shift, tail in zip(shifts, tails, strict=True)]
    if sums:
        sums = list(shard.added(torch.cat(sums)).split([tail.powers for tail in tails]))
    with torch.enable_grad():
        inputs = [tensor.to(row_dtype(rows)).requires_grad_() for tensor in (values, *sums)]
        loss = call.loss.formula(inputs[0], own, call.options, *tensors, tails=inputs[1:])
        slopes = torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
    at_head, *at_sums = (settled(slope if place == 0 else slope.T, state) for place, slope in enumerate(slopes))
    pairs = [tensor for pair in zip(shifts, at_sums, strict=True) for tensor in pair]
    return settled(loss.detach().to(rows.dtype), state), places, at_head, *pairs


def _head(scores: Tensor, target: Tensor, depth: int, shard: ClassShard) -> tuple[Tensor, Tensor, Tensor]:
    """The row's `depth` largest scores, and the target's where it is another, by ascending class; classes; y's place.

    Where the target is among them a stand-in of score -inf, behind all classes, takes the place of one more.
    """
    rows, slice_classes = scores.shape
    found, index = (
        ordered_topk(scores, min(depth, slice_classes)) if slice_classes else (scores, target[:, None][:, :0])
    )
    values = scores.new_full((rows, depth + 1), -torch.inf)
    classes = torch.full((rows, depth), shard.total, device=scores.device)
    values[:, : found.shape[1]], classes[:, : found.shape[1]] = found, index + shard.start
    local = target - shard.start
    mine = ((local >= 0) & (local < slice_classes)).nonzero().squeeze(1)
    values[mine, depth] = scores[mine, local[mine]]
    bits = _MESSAGES[scores.dtype]
    messages = torch.stack(shard.gathered(torch.cat((values.view(bits), classes.to(bits)), 1)), 1)
    values = messages[:, :, : depth + 1].contiguous().view(scores.dtype)
    own, values, classes = values[:, :, depth].amax(1), values[:, :, :depth].flatten(1), messages[:, :, depth + 1 :]
    classes, order = classes.flatten(1).long().sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    values, classes = values[:, :depth], classes.gather(1, order)[:, :depth]
    if depth < shard.total:
        listed = (classes == target[:, None]).any(1)
        values = torch.cat((values, own.masked_fill(listed, -torch.inf)[:, None]), 1)
        classes = torch.cat((classes, target.masked_fill(listed, shard.total)[:, None]), 1)
    classes, order = classes.sort(1)
    return values.gather(1, order), classes, (classes == target[:, None]).to(torch.uint8).argmax(1)


def _shift(values: Tensor, own: Tensor, tail: Tail) -> Tensor:
    """The row's largest score, or the rank-th of the classes other than y; 0 where that is not finite."""
    if tail.rank == 0:
        return finite_or_zero(values.amax(1))
    wrong = values.scatter(1, own[:, None], -torch.inf)
    return finite_or_zero(wrong.topk(tail.rank, dim=1).values[:, -1])


def _power_sums(scores: Tensor, places: Tensor, shift: Tensor, tail: Tail) -> Tensor:
    """sum of exp(m rate (x - shift)) for m = 1..powers (powers, rows), over the slice without `places`."""
    rows, classes = scores.shape
    sums = scores.new_zeros((tail.powers, rows))
    if classes == 0:
        return sums
    odds_buffer, power_buffer = buffers(scores, 2, width=classes + 1)
    for part in chunks(scores):
        odds, power = odds_buffer[: part.stop - part.start], power_buffer[: part.stop - part.start]
        odds[:, classes] = 0.0  # the column of classes that are elsewhere
        exponents(scores[part], shift[part], tail.rate, odds[:, :classes])
        exponentials(odds)[:, classes] = 0.0
        power.copy_(odds.scatter_(1, places[part], 0.0))
        for m in range(tail.powers):
            torch.sum(power, 1, out=sums[m, part])
            power.mul_(odds)
    return sums


def sliced_gradient(call: Call, grad: Tensor, scores: Tensor, saved: Sequence[Tensor]) -> Tensor:
    """The gradient of sum(grad * loss) in the slice's scores."""
    assert call.loss.head is not None
    places, at_head, *pairs = saved
    tails, classes = call.loss.head(call.options).tails, scores.shape[1]
    broken = at_head.isnan().any(1)
    result = torch.where(broken, torch.nan, 0.0).to(compute_dtype(scores))[:, None].repeat(1, classes + 1)
    scale = grad.to(at_head.dtype)[:, None]
    for tail, shift, slopes in zip(tails, pairs[::2], pairs[1::2], strict=True):
        degree = torch.arange(1, tail.powers + 1, device=scores.device)
        columns = (slopes * scale * degree * tail.rate).to(result.dtype).unsqueeze(-1).unbind(1)
        for part in chunks(scores) if classes else ():
            odds = (scores[part].to(result.dtype) - shift[part, None]).mul_(tail.rate).clamp_(max=0.0)
            odds = exponentials(odds)
            field = odds * columns[-1][part]
            for column in columns[-2::-1]:
                field.add_(column[part]).mul_(odds)
            result[part, :classes] += field
    return result.scatter_(1, places, (at_head * scale).to(result.dtype))[:, :classes]


def few_of_slice(grad: Tensor, scores: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The same as classes of the slice and slopes (rows, head), where the loss has no tail and the slice a class."""
    places, at_head, *pairs = saved
    if pairs or scores.shape[1] == 0:
        return None
    inside = places < scores.shape[1]
    slopes = torch.where(inside, at_head * grad.to(at_head.dtype)[:, None], 0.0)
    return torch.where(inside, places, 0), slopes.to(compute_dtype(scores))


def sliced_ranks(scores: Tensor, target: Tensor, shard: ClassShard, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The rank of every row's target (rows,), total + 1 where a score is NaN; whether the row has a target.

    One all_reduce finds the targets' scores, and one adds the counts.
    """
    shard.check("scores", scores.shape[1])
    state = check_targets(target, shard.total, ignore_index)[0]
    local, broken = state - shard.start, scores.isnan().any(1)
    mine = ((local >= 0) & (local < scores.shape[1]) & ~broken).nonzero().squeeze(1)
    own = torch.full(target.shape, -torch.inf, dtype=scores.dtype, device=scores.device)
    own[mine] = scores[mine, local[mine]]
    own = own.to(torch.promote_types(own.dtype, torch.float32))
    torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX, group=shard.group)
    before = torch.arange(shard.start, shard.start + scores.shape[1], device=scores.device) < state[:, None]
    ahead = (scores > own[:, None]) | ((scores == own[:, None]) & before)
    counts = shard.added(torch.stack((ahead.sum(1), broken.long())))
    return torch.where(counts[1] > 0, shard.total, counts[0]) + 1, state >= 0
