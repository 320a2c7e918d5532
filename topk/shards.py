"""Classes spread over processes: each holds the scores of a slice of them (book, chapter "A million classes").

A loss looks at a row's *head*, its few largest scores and the target's, and at the other classes, its *tail*, through
a few numbers alone. So with P slices

1. every process sends the `depth` largest scores of its slice, with their classes, and the target's score: one
   all_gather, after which all know the row's head, of equals the lower class first;
2. the tail's numbers are found (`topk.tails`): for most losses sums that one all_reduce adds, for hinges none;
3. every process computes the loss of (head, numbers) with the loss's own definition, and its slopes in both; from
   these the gradient of its slice follows without a message.

What step 2 sends, in numbers a row (several k share the messages):

    hinges that are not smoothed, differentiable, noised with samples or epsilon = 0      nothing
    entropies, transition, focal, LDAM, LDR, AUTKC, softmax at K, softmax over all        one sum of 1, or 3 if smoothed
    smooth, k <= 10                                                                       one sum of k
    smooth, k > 10                4 to 16 sums of 2 (a tilt), then every slice's k + 1 chances
    LDR with alpha                a sum of 3 a Newton step: about 5
    noised, samples = None        6 sums of 3 (a grid), then every slice's k + 1 chances at 36 nodes
    alpha_smooth, beta_smooth, polyhedral                nothing, unless more classes than the head have a slope:
                                                         then a sum of 3 a Newton step, about 5
    polyhedral_smooth             the same, and one sum at least

Noise is a function of (seed, row, class among all, sample), and every sample has its own largest scores, all sent in
the first step: so it does not depend on who holds which class, where all processes draw the same seed.

Rows, targets, weights and margins are the same on all processes; a target, a weight or a margin counts in all classes.
A row whose target is masked (-inf) has the loss +inf, and here no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from topk._cpu import CHUNK, ordered_topk, row_chunks
from topk.arguments import IGNORED, check_count, check_targets
from topk.autograd import Call, compute_dtype, settled, without_autocast
from topk.losses import noised
from topk.losses.common import PendingScores, finite_or_zero, row_dtype
from topk.losses.noised_sampling import counted_normals
from topk.losses.soft import is_distributed
from topk.tails import Slice, in_step

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

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

    @property
    def process(self) -> int:
        """Which of them this is."""
        return int(torch.distributed.get_rank(self.group))

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

    A DTensor with the placement Shard(-1) may be given to a loss itself.

    Args:
        loss: a loss module of this package.
        scores: (rows, classes of the slice).
        target: (rows,), class indices among all classes, or (rows, all classes), probabilities with few above 0.
        shard: which classes these are.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must have shape (rows, classes of the slice), got {tuple(scores.shape)}")
    shard.check("scores", scores.shape[1])
    value: Tensor = loss(_pending(scores, shard), target)
    return value


def of_dtensor(scores: DTensor) -> PendingScores:
    """Stands in for a DTensor that is cut along its classes."""
    return _pending(scores.to_local(), _shard_of("scores", scores, 1))


def of_layer(
    features: Tensor, weight: DTensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, ClassShard]:
    """What this process has of a last layer whose weight is a DTensor cut along its classes, and of its features."""
    shard = _shard_of("weight", weight, 0)
    if bias is not None:
        if not is_distributed(bias) or _shard_of("bias", bias, 0) != shard:
            raise ValueError("bias must be a DTensor, cut as weight is")
        bias = bias.to_local()
    if is_distributed(features):
        if not all(placement.is_replicate() for placement in features.placements):
            raise ValueError(f"features as a DTensor must be the same on all processes, got {features.placements}")
        features = features.to_local()
    return features, weight.to_local(), bias, shard


def _shard_of(name: str, tensor: DTensor, classes: int) -> ClassShard:
    """Which classes a process has of a matrix, or a vector, that is cut along this axis."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    axes, total = tensor.dim(), int(tensor.shape[classes]) if tensor.dim() > classes else 0
    if axes > 2 or tuple(tensor.placements) not in ((Shard(classes),), (Shard(classes - axes),)):
        raise ValueError(
            f"{name} as a DTensor must be cut along its classes, Shard({classes}), on a mesh of one axis, "
            f"got shape {tuple(tensor.shape)} with {tensor.placements}"
        )
    offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]
    return ClassShard(min(int(offset[classes]), total), total, tensor.device_mesh.get_group())


def held(scores: Tensor) -> tuple[Tensor, ClassShard | None]:
    """The slice that is here of a DTensor, or of what stands in for one; other scores as they are."""
    known = of_dtensor(scores) if is_distributed(scores) else scores
    if isinstance(known, PendingScores) and known.held is not None:
        return known.held
    return scores, None


def _pending(scores: Tensor, shard: ClassShard) -> PendingScores:
    def source(call: Call, target: Tensor, tensors: tuple[Tensor, ...], share: Tensor | None, reduction: str) -> Tensor:
        value: Tensor = SlicedRowLoss.apply(call, shard, scores, target, *tensors)
        return value if share is None else torch.where(share == 0.0, 0.0, value * share)

    def chosen(rows: Tensor) -> PendingScores:
        return _pending(scores[rows], shard)

    def leading(target: Tensor, count: int) -> tuple[Tensor, Tensor]:
        values, _, own = _head(scores.detach().to(compute_dtype(scores)), target, count, shard)
        return values.topk(count, dim=1).values, values.gather(1, own[:, None]).squeeze(1)

    known = (scores, shard)
    return PendingScores.of(scores, scores.shape[0], shard.total, scores.dtype, source, chosen, known, leading)


class SlicedRowLoss(torch.autograd.Function):
    """The loss of every row. Inputs: call, shard, the slice's scores, target, *tensors."""

    @staticmethod
    def forward(ctx: Any, call: Call, shard: ClassShard, scores: Tensor, target: Tensor, *tensors: Tensor) -> Tensor:
        with without_autocast(scores):
            loss, *saved = sliced_values(call, shard, scores, target, tensors)
        ctx.call, ctx.tensors = call, len(tensors)
        ctx.save_for_backward(scores, *saved)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, *saved = ctx.saved_tensors
        with without_autocast(scores):
            gradient = sliced_gradient(ctx.call, grad, scores, saved)
        return None, None, gradient.to(scores.dtype), None, *([None] * ctx.tensors)


def sliced_values(
    call: Call, shard: ClassShard, scores: Tensor, target: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The loss of every row, its state, the head's places in the slice and slopes (rows, head), and what tails keep.

    Of every tail that is its shift (rows,), slopes and settings (rows, numbers). A place beyond the slice says that
    another process has the class.
    """
    if call.loss.head is None:
        raise ValueError(f"loss must have a form for sharded classes, which {call.loss.name} has not")
    depth, tails, noise = call.loss.head(call.options)
    depth = min(depth, shard.total)
    rows, state = scores.to(compute_dtype(scores)), check_targets(target, shard.total, call.ignore_index)[0]
    if noise is not None:
        loss, classes, at_head = _noised_values(call.options, shard, rows, state.clamp(min=0), depth, noise, tensors)
        return settled(loss.to(rows.dtype), state), state, _places(classes, rows, shard), settled(at_head, state)
    values, classes, own = _head(rows, state.clamp(min=0), depth, shard)
    part = Slice(rows, _places(classes, rows, shard), values, own, shard)
    numbers = in_step(shard, [tail.talk(part) for tail in tails])
    with torch.enable_grad():
        inputs = [tensor.to(row_dtype(rows)).requires_grad_() for tensor in (values, *numbers)]
        loss = call.loss.formula(inputs[0], own, call.options, *tensors, tails=inputs[1:])
        slopes = torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True)
    saved = []
    for tail, slope, found in zip(tails, slopes[1:], inputs[1:], strict=True):
        kept = tail.kept(slope, found.detach())
        saved += [part.shift(tail.rank), *(settled(each.T, state) for each in kept)]
    return settled(loss.detach().to(rows.dtype), state), state, part.places, settled(slopes[0], state), *saved


def _places(classes: Tensor, scores: Tensor, shard: ClassShard) -> Tensor:
    """Where the slice has these of all classes, or its size where it has not."""
    local, size = classes - shard.start, scores.shape[1]
    return torch.where((local >= 0) & (local < size), local, size)


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
    values[:, depth] = _own_scores(scores, target, shard)
    bits = _MESSAGES[scores.dtype]
    messages = torch.stack(shard.gathered(torch.cat((values.view(bits), classes.to(bits)), 1)), 1)
    values = messages[:, :, : depth + 1].contiguous().view(scores.dtype)
    own, values, classes = values[:, :, depth].amax(1), values[:, :, :depth].flatten(1), messages[:, :, depth + 1 :]
    classes = classes.flatten(1).long()
    order = _first(values, classes, depth)
    values, classes = values.gather(1, order), classes.gather(1, order)
    if depth < shard.total:
        listed = (classes == target[:, None]).any(1)
        values = torch.cat((values, own.masked_fill(listed, -torch.inf)[:, None]), 1)
        classes = torch.cat((classes, target.masked_fill(listed, shard.total)[:, None]), 1)
    classes, order = classes.sort(1)
    return values.gather(1, order), classes, (classes == target[:, None]).to(torch.uint8).argmax(1)


def _first(values: Tensor, classes: Tensor, depth: int) -> Tensor:
    """Where the `depth` largest are along the last axis, of equals those of the lower classes."""
    by_class = classes.argsort(dim=-1)
    order = values.gather(-1, by_class).argsort(stable=True, dim=-1, descending=True)
    return by_class.gather(-1, order)[..., :depth]


def _noised_values(
    options: noised.Options,
    shard: ClassShard,
    scores: Tensor,
    target: Tensor,
    depth: int,
    noise_of: tuple[float, int],
    tensors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The noised loss of every row, the classes that were (k+1)-th in some sample and y, and their slopes."""
    (epsilon, samples), (margins, seeds) = noise_of, tensors
    (rows, slice_classes), dtype = scores.shape, scores.dtype
    few = min(depth, slice_classes)
    found = scores.new_full((rows, samples, 2, depth), -torch.inf)  # scores and their noise
    classes = torch.full((rows, samples, depth), shard.total, device=scores.device)
    for part in row_chunks(rows, slice_classes * samples, CHUNK if scores.is_cpu else 64 * CHUNK) if few else ():
        x = scores[part]
        normals = counted_normals(seeds[0], part.start, x.shape[0], slice_classes, samples, shard.start)
        noise = normals.to(dtype).mul_(epsilon).transpose(0, 1)
        middle = finite_or_zero(x.topk(few, dim=1).values[:, -1:])
        index = ordered_topk((noise + (x - middle)[:, None]).flatten(0, 1), few)[1].view(-1, samples, few)
        found[part, :, 0, :few] = x.gather(1, index.flatten(1)).view(index.shape)
        found[part, :, 1, :few] = noise.gather(2, index)
        classes[part, :, :few] = index + shard.start
    own = _own_scores(scores, target, shard)
    bits = _MESSAGES[dtype]
    message = torch.cat((found.flatten(1).view(bits), own[:, None].view(bits), classes.flatten(1).to(bits)), 1)
    messages = torch.stack(shard.gathered(message), 1)
    numbers, which = messages.split((2 * samples * depth + 1, samples * depth), 2)
    numbers = numbers.contiguous().view(dtype).to(row_dtype(scores))
    own = numbers[:, :, -1].amax(1)
    x, noise = (
        each.flatten(2) for each in numbers[:, :, :-1].unflatten(2, (samples, 2, depth)).permute(3, 0, 2, 1, 4)
    )  # (rows, samples, processes * depth)
    classes = which.long().unflatten(2, (samples, depth)).transpose(1, 2).flatten(2)
    order = _first(x + noise, classes, depth)[:, :, options.ks]
    centre = finite_or_zero(x.gather(2, order)[:, 0])
    rise = (x.gather(2, order) - centre[:, None] + noise.gather(2, order)).mean(1)
    best = x.flatten(1).amax(1)
    loss, slopes = noised.hinges(best, centre, rise, own, margins, options)
    push = slopes.masked_fill((own == -torch.inf)[:, None], 0.0)
    spread = (push / samples)[:, None].expand(order.shape).flatten(1)
    listed = torch.cat((classes.gather(2, order).flatten(1), target[:, None]), 1)
    return loss, listed, torch.cat((spread, -push.sum(1, keepdim=True)), 1)


def _own_scores(scores: Tensor, target: Tensor, shard: ClassShard) -> Tensor:
    """x_y (rows,) where the slice has y, else -inf."""
    local = _places(target, scores, shard)
    mine = (local < scores.shape[1]).nonzero().squeeze(1)
    own = scores.new_full(target.shape, -torch.inf)
    own[mine] = scores[mine, local[mine]]
    return own


def sliced_gradient(call: Call, grad: Tensor, scores: Tensor, saved: Sequence[Tensor]) -> Tensor:
    """The gradient of sum(grad * loss) in the slice's scores."""
    assert call.loss.head is not None
    state, places, at_head, *of_tails = saved
    tails, classes = call.loss.head(call.options).tails, scores.shape[1]
    background = torch.where(at_head.isnan().any(1), torch.nan, 0.0).to(compute_dtype(scores))[:, None]
    result, scale = background.repeat(1, classes + 1), grad.to(at_head.dtype)[:, None]
    for tail, shift, slopes, settings in zip(tails, of_tails[::3], of_tails[1::3], of_tails[2::3], strict=True):
        tail.add_field(result[:, :classes], scores, shift, slopes * scale, settings)
    if not any(tail.whole for tail in tails):
        result.scatter_(1, places, background.expand(places.shape))
    result.scatter_add_(1, places, (at_head * scale).to(result.dtype))
    ignored = (state == IGNORED)[:, None]
    if not ignored.is_cpu or bool(ignored.any()):
        result.masked_fill_(ignored, 0.0)  # such a row may hold anything
    return result[:, :classes]


def few_of_slice(grad: Tensor, scores: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The same as classes of the slice and slopes (rows, head), where the loss has no tail and the slice a class."""
    _, places, at_head, *of_tails = saved
    if of_tails or scores.shape[1] == 0:
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
