"""Losses fused with the last layer: the matrix of scores is never held (book, chapter "A million classes").

The scores W h + b of all rows and classes, and their gradient, are by far the largest tensors of a step once there are
many classes. Here they are made a chunk of rows at a time, and with G the gradient of a chunk's loss in its scores,

    gradient in h = G W,        gradient in W += G^T h,        gradient in b += sum of G over its rows.

Where G has few entries a row that are not 0, only their classes' rows of W are read and written. For a mean or a sum
all is done in forward, and backward scales; for single rows, whose gradients come later, the chunks are made again.
What is summed over chunks is float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topk.arguments import check_count, check_number
from topk.autograd import Call, compute_dtype, few_gradients, is_traced, row_gradients, row_loss, row_values
from topk.losses.common import LossModule, PendingScores
from topk.losses.imbalance import FocalLoss
from topk.losses.soft import is_distributed
from topk.losses.transition import TransitionTopKLoss
from topk.shards import ClassShard, few_of_slice, of_layer, sliced_gradient, sliced_values

CHUNK = 2**25
"""Scores made at a time, unless that were fewer than so many rows, for which W's gradient would be read too often."""

_LEAST_ROWS = 128
_FEW_OF = 2000  # classes, below which products with all of them are quicker than gathering a few


_Layer = tuple[Tensor, Tensor, Tensor | None]  # features, weight, bias


class _Plan(NamedTuple):
    """What a call holds besides tensors."""

    call: Call
    chunk: int  # rows
    dtype: torch.dtype  # of the products
    reduced: bool
    shard: ClassShard | None


def linear_loss(
    loss: nn.Module,
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    cosine_scale: float | None = None,
    chunk: int | None = None,
    shard: ClassShard | None = None,
    by_torch: bool = False,
) -> Tensor:
    r"""``loss(F.linear(features, weight, bias), target)`` without ever holding the scores; chapter "A million classes".

    Peak memory beyond the inputs and their gradients is two chunks of scores. Conventions are those of
    ``F.linear_cross_entropy``. Under ``torch.compile`` and the transforms of ``torch.func``, and for second
    derivatives, the scores are held.

    Args:
        loss: a loss module of this package, or ``torch.nn.CrossEntropyLoss``; its ``weight``, ``ignore_index`` and
            ``reduction`` count as always. Torch computes cross-entropy itself where the scores are few, on a CPU.
        features: (..., features), any floating-point type.
        weight: (classes, features).
        target: (...), class indices, or (..., classes), probabilities with few classes a row above 0: the expected
            loss, for which a row's scores are made again for each of them.
        bias: (classes,), or None.
        cosine_scale: None, or a number > 0: the scores are so many times the cosines between features and weight.
        chunk: how many rows are worked on at a time; None: as many as make 2^25 scores, and at least 128.
        shard: which classes ``weight`` and ``bias`` are, where processes share them (see ``topk.sharded_loss``); the
            features are the same on all processes, and so is the gradient that they get. A ``weight`` (and ``bias``)
            that is a DTensor with Shard(0) needs none.
        by_torch: runs ``F.linear_cross_entropy`` where torch has it; for ``torch.nn.CrossEntropyLoss`` alone.
    """
    if not by_torch:
        _check_loss(loss)
    if is_distributed(weight):
        features, weight, bias, shard = of_layer(features, weight, bias)
        target = target.full_tensor() if is_distributed(target) else target
    _check_inputs(features, weight, bias, target, None if shard is None else shard.total)
    rows_at_once = None if chunk is None else check_count("chunk", chunk)
    if cosine_scale is not None:
        if bias is not None:
            raise ValueError("bias must be None where cosine_scale is given")
        features, weight = _cosine_factors(features, weight, check_number("cosine_scale", cosine_scale, above=0.0))
    flat = features.reshape(-1, features.shape[-1])
    target = target.reshape(flat.shape[0], *target.shape[features.dim() - 1 :])
    if shard is not None:
        shard.check("weight", weight.shape[0])
    if by_torch:
        value = _by_torch(loss, flat, weight, target, bias)
    elif shard is None and (torch._C._are_functorch_transforms_active() or is_traced(flat) or is_traced(weight)):
        value = _criterion(loss)(F.linear(flat, weight, bias), target)
    elif shard is None and chunk is None and _better_held(loss, flat, weight, target):
        scores = F.linear(flat, weight, bias)
        value = loss(scores.to(compute_dtype(scores)), target)
    else:
        value = _criterion(loss)(_scores_to_come(flat, weight, bias, rows_at_once, shard), target)
    return value.reshape(features.shape[:-1]) if value.dim() > 0 else value


def _cosine_factors(features: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return scale * F.normalize(features, dim=-1), F.normalize(weight, dim=-1)


def _check_loss(loss: nn.Module) -> None:
    """Refuses what is no loss of scores and targets, and what looks at all scores before the loss is computed."""
    if isinstance(loss, nn.CrossEntropyLoss):
        if loss.label_smoothing > 0.0 and loss.weight is not None:
            raise ValueError("loss must not have both label_smoothing and weight, unless by_torch=True")
    elif not isinstance(loss, LossModule):
        raise TypeError(f"loss must be a loss module of topk or torch.nn.CrossEntropyLoss, got {type(loss).__name__}")
    elif loss.training and getattr(loss, "transition", None) == "accuracy":
        raise ValueError("loss must not have transition='accuracy' in training: it counts all scores before the loss")


def _criterion(loss: nn.Module) -> nn.Module:
    """The loss as one of ours; cross-entropy is the focal loss that forgives nothing, or the transition that never is.

    To make a module takes a millisecond: it tries its arguments.
    """
    if not isinstance(loss, nn.CrossEntropyLoss):
        return loss
    tail: dict[str, Any] = {"ignore_index": loss.ignore_index, "reduction": loss.reduction}
    if loss.label_smoothing == 0.0:
        return FocalLoss(gamma=0.0, weight=loss.weight, **tail)
    return TransitionTopKLoss(1, transition=0.0, label_smoothing=loss.label_smoothing, **tail)


def _check_inputs(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, classes: int | None) -> None:
    for name, tensor in (("features", features), ("weight", weight), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (classes, features), got {tuple(weight.shape)}")
    if features.dim() < 1 or features.shape[-1] != weight.shape[1]:
        expected = f"(..., {weight.shape[1]})"
        raise ValueError(f"features must have shape {expected} as weight has, got {tuple(features.shape)}")
    shape = features.shape[:-1]
    if target.is_floating_point():
        shape = torch.Size((*shape, classes or weight.shape[0]))
    if target.shape != shape:
        raise ValueError(f"target must have shape {tuple(shape)}, got {tuple(target.shape)}")
    if bias is not None and tuple(bias.shape) != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), one number a class, got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), *(() if bias is None else (("bias", bias),))):
        if tensor.device != features.device:
            raise ValueError(f"{name} must be on the device of features, {features.device}, got {tensor.device}")


def _by_torch(loss: nn.Module, features: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
    if not isinstance(loss, nn.CrossEntropyLoss):
        raise ValueError(f"by_torch must be False unless loss is torch.nn.CrossEntropyLoss, got {type(loss).__name__}")
    operator = getattr(F, "linear_cross_entropy", None)
    if operator is None:
        raise RuntimeError("by_torch=True needs F.linear_cross_entropy, which this torch does not have (2.13 has)")
    options = {name: getattr(loss, name) for name in ("weight", "reduction", "ignore_index", "label_smoothing")}
    value: Tensor = operator(features, weight, target, linear_bias=bias, **options)
    return value


def _better_held(loss: nn.Module, features: Tensor, weight: Tensor, target: Tensor) -> bool:
    """Whether torch's own cross-entropy is quicker, and its three copies of the scores are less than two chunks."""
    few = 4 * features.shape[0] * weight.shape[0] <= CHUNK
    if not (few and features.is_cpu and isinstance(loss, nn.CrossEntropyLoss)) or target.is_floating_point():
        return False
    return bool(((target >= 0) & (target < weight.shape[0])).all())


def _scores_to_come(
    features: Tensor, weight: Tensor, bias: Tensor | None, chunk: int | None, shard: ClassShard | None
) -> PendingScores:
    """Stands in for the scores: what the loss makes of its arguments comes back to `LinearLoss`."""
    rows, device = features.shape[0], features.device.type
    classes, held = (weight.shape[0],) * 2 if shard is None else (shard.total, shard.total // shard.processes + 1)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype
    step = chunk or max(_LEAST_ROWS, CHUNK // held)

    def source(call: Call, target: Tensor, tensors: tuple[Tensor, ...], share: Tensor | None, reduction: str) -> Tensor:
        plan = _Plan(call, step, dtype, reduction != "none", shard)
        value: Tensor = LinearLoss.apply(plan, features, weight, bias, target, share, *tensors)
        return value

    def chosen(rows: Tensor) -> PendingScores:
        return _scores_to_come(features[rows], weight, bias, chunk, shard)

    scores = PendingScores.of(features, rows, classes, dtype, source, chosen)
    wanted = any(tensor is not None and tensor.requires_grad for tensor in (features, weight, bias))
    scores.requires_grad_(wanted and torch.is_grad_enabled())
    return scores


class LinearLoss(torch.autograd.Function):
    """Inputs: plan, features, weight, bias, target, share, *tensors; gives the rows' losses, or their sum."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *inputs: Any) -> Tensor:
        features, weight, bias, target, share, *tensors = inputs
        ctx.plan, ctx.wanted, ctx.gradients = plan, ctx.needs_input_grad[1:4], None
        ctx.save_for_backward(*inputs)
        factors = None
        if plan.reduced:
            ones = torch.ones(target.shape, dtype=_loss_dtype(plan), device=features.device)
            factors = ones if share is None else share
        at_once = factors if any(ctx.wanted) else None
        values, ctx.gradients = _passed(plan, (features, weight, bias), target, tensors, at_once, ctx.wanted)
        if factors is not None:
            # An infinite loss of a row without weight is none.
            return torch.where(factors == 0.0, 0.0, values * factors).sum()
        return values if share is None else torch.where(share == 0.0, 0.0, values * share)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias, target, share, *tensors = ctx.saved_tensors
        layer, plan = (features, weight, bias), ctx.plan
        factors = grad.expand(target.shape) if share is None else grad * share
        gradients, ctx.gradients = ctx.gradients, None
        if torch.is_grad_enabled():
            gradients = _differentiable_gradients(plan, layer, target, tensors, factors, ctx.wanted)
        elif gradients is None:
            gradients = _passed(plan, layer, target, tensors, factors, ctx.wanted)[1]
        else:  # no longer kept, so that they may be overwritten
            scale = torch.where((target != plan.call.ignore_index).any(), grad, 0.0)  # a mean of nothing divides by 0
            gradients = [None if gradient is None else gradient.mul_(scale) for gradient in gradients]
        typed = [None if g is None else g.to(tensor.dtype) for g, tensor in zip(gradients, layer, strict=True)]
        return None, *typed, None, None, *([None] * len(tensors))


def _loss_dtype(plan: _Plan) -> torch.dtype:
    return torch.promote_types(plan.dtype, torch.float32)


def _in_type(layer: _Layer, dtype: torch.dtype) -> _Layer:
    features, weight, bias = layer
    return features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _parts(plan: _Plan, target: Tensor) -> Iterator[slice | Tensor]:
    """Chunks of rows, all of about one size; on the CPU, where a look costs nothing, without those that are ignored."""
    used = (target != plan.call.ignore_index).nonzero().squeeze(1) if target.is_cpu else None
    rows = target.shape[0] if used is None else used.shape[0]
    if rows == 0:
        return
    size = -(-rows // -(-rows // plan.chunk))
    if used is not None and rows < target.shape[0]:
        yield from used.split(size)
    else:
        yield from (slice(start, start + size) for start in range(0, rows, size))


def _of_part(tensors: Any, part: slice | Tensor, rows: int, ordinal: int) -> tuple[Tensor, ...]:
    """What a chunk has of a loss's tensors: its rows of those with one entry a row; of seeds, every chunk its own."""
    return tuple(tensor[part] if tensor.shape[0] == rows else tensor + ordinal for tensor in tensors)


def _passed(
    plan: _Plan,
    layer: _Layer,
    target: Tensor,
    tensors: Any,
    factors: Tensor | None,  # (rows,)
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor | None] | None]:
    """The loss of every row; with `factors` also the gradients of sum(factors * loss) that are wanted."""
    features, weight, bias = _in_type(layer, plan.dtype)
    values = torch.zeros(target.shape, dtype=_loss_dtype(plan), device=features.device)
    gradients: list[Tensor | None] | None = None
    parts = list(_parts(plan, target))
    # One buffer for the scores of all chunks: fresh memory costs the CPU a microsecond for every page of it.
    buffer = features.new_empty((min(plan.chunk, features.shape[0]), weight.shape[0]))
    with torch.autocast(features.device.type, enabled=False):
        for ordinal, part in enumerate(parts):
            own = _of_part(tensors, part, target.shape[0], ordinal)
            grad = None if factors is None else factors[part]
            scores = _scores(plan, features[part], weight, bias, buffer)
            values[part], slopes = _loss_and_slopes(plan, grad, scores, target[part], own)
            del scores  # or the next chunk's are made beside these
            if ordinal == len(parts) - 1:
                buffer = features.new_empty(0)  # before there are gradients, where one chunk is all
            if factors is not None:
                gradients = gradients or _zeros(plan, (features, weight, bias), wanted)
                add = _add_few if isinstance(slopes, tuple) else _add_all
                add(gradients, part, features[part], weight, slopes)
            del slopes
    if factors is not None and gradients is None:
        gradients = _zeros(plan, (features, weight, bias), wanted)
    if plan.shard is not None and gradients is not None and gradients[0] is not None:
        plan.shard.added(gradients[0])
    return values, gradients


def _zeros(plan: _Plan, layer: _Layer, wanted: tuple[bool, bool, bool]) -> list[Tensor | None]:
    """Gradients to add to: the features' in their own type, as each row gets its one, the others' at least float32."""
    types = (plan.dtype, *[_loss_dtype(plan)] * 2)
    return [
        torch.zeros_like(tensor, dtype=dtype) if tensor is not None and want else None
        for tensor, dtype, want in zip(layer, types, wanted, strict=True)
    ]


def _scores(plan: _Plan, features: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """Half types are rounded, as the scores of an unfused layer are, and widened once."""
    scores = buffer[: features.shape[0]]
    if bias is None:
        torch.mm(features, weight.T, out=scores)
    else:
        torch.addmm(bias, features, weight.T, out=scores)
    return scores.to(compute_dtype(scores)) if plan.call.backend == "torch" else scores


def _loss_and_slopes(
    plan: _Plan, grad: Tensor | None, scores: Tensor, target: Tensor, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, Any]:
    """The loss of every row and, for a `grad`, the gradient in the scores: of all classes, or of a few a row."""
    few: tuple[Tensor, Tensor] | None
    if plan.shard is not None:
        loss, *saved = sliced_values(plan.call, plan.shard, scores, target, tensors)
        if grad is None:
            return loss, None
        few = few_of_slice(grad, scores, saved)
        return loss, sliced_gradient(plan.call, grad, scores, saved) if few is None else few
    loss, state, *kept = row_values(plan.call, scores, target, tensors)
    if grad is None:
        return loss, None
    arguments = (plan.call, grad, scores, state, tensors, tuple(kept))
    few = few_gradients(*arguments) if scores.shape[1] > _FEW_OF else None
    return loss, row_gradients(*arguments) if few is None else few


def _add_all(
    gradients: list[Tensor | None], part: slice | Tensor, features: Tensor, weight: Tensor, slopes: Tensor
) -> None:
    """The products with the gradient of a chunk's scores (chunk, classes)."""
    at_features, at_weight, at_bias = gradients
    if at_features is not None:
        at_features[part] = slopes.to(weight.dtype) @ weight
    if at_weight is not None and slopes.is_cpu:
        at_weight.addmm_(slopes.T.to(at_weight.dtype), features.to(at_weight.dtype))
    elif at_weight is not None:  # in the type that has fast products
        at_weight += slopes.to(features.dtype).T @ features
    if at_bias is not None:
        at_bias += slopes.sum(0, dtype=at_bias.dtype)


def _add_few(
    gradients: list[Tensor | None],
    part: slice | Tensor,
    features: Tensor,
    weight: Tensor,
    few: tuple[Tensor, Tensor],  # (chunk, few): classes and slopes
) -> None:
    """The same where a few classes of each row have a slope."""
    classes, slopes = few
    at_features, at_weight, at_bias = gradients
    if at_features is not None:
        at_features[part] = (slopes.to(weight.dtype)[:, None] @ weight[classes]).squeeze(1)
    if at_weight is not None:
        products = slopes.to(at_weight.dtype)[:, :, None] * features.to(at_weight.dtype)[:, None]
        at_weight.index_add_(0, classes.flatten(), products.flatten(0, 1))
    if at_bias is not None:
        at_bias.index_add_(0, classes.flatten(), slopes.to(at_bias.dtype).flatten())


def _differentiable_gradients(
    plan: _Plan,
    layer: _Layer,
    target: Tensor,
    tensors: Any,
    factors: Tensor,
    wanted: tuple[bool, bool, bool],
) -> list[Tensor | None]:
    """The gradients as functions that can be differentiated again, from scores that are held."""
    if plan.shard is not None:
        raise RuntimeError("shard must be None where second derivatives are wanted")
    features, weight, bias = _in_type(layer, plan.dtype)
    total = features[:0].sum(dtype=factors.dtype) + weight[:0].sum(dtype=factors.dtype)
    for ordinal, part in enumerate(_parts(plan, target)):
        own = _of_part(tensors, part, target.shape[0], ordinal)
        values = row_loss(plan.call, F.linear(features[part], weight, bias), target[part], *own)
        total = total + (values * factors[part]).sum()
    inputs = [tensor for tensor, want in zip(layer, wanted, strict=True) if tensor is not None and want]
    found = iter(torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True, materialize_grads=True))
    return [next(found) if want else None for want in wanted]


class LinearTopKLoss(nn.Module):
    """A last layer and its loss in one, so that the scores are never held: :func:`topk.linear_loss` with parameters.

    ``scores(features)`` gives the scores themselves, for evaluation. Where processes share the classes, ``classes`` is
    how many this one holds and ``shard`` which ones; ``scores`` are then those of its slice.
    """

    def __init__(
        self,
        loss: nn.Module,
        in_features: int,
        classes: int,
        *,
        bias: bool = True,
        cosine_scale: float | None = None,
        chunk: int | None = None,
        shard: ClassShard | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_loss(loss)
        self.loss, self.chunk = loss, None if chunk is None else check_count("chunk", chunk)
        self.cosine_scale = None if cosine_scale is None else check_number("cosine_scale", cosine_scale, above=0.0)
        self.shard = shard
        sizes = check_count("in_features", in_features), check_count("classes", classes, least=0 if shard else 1)
        if shard is not None:
            shard.check("classes", sizes[1])
        self.linear = nn.Linear(*sizes, bias=bias and cosine_scale is None, device=device, dtype=dtype)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss of these features."""
        weight, bias, scale = self.linear.weight, self.linear.bias, self.cosine_scale
        options: dict[str, Any] = {"bias": bias, "cosine_scale": scale, "chunk": self.chunk, "shard": self.shard}
        return linear_loss(self.loss, features, weight, target, **options)

    def scores(self, features: Tensor) -> Tensor:
        """The scores (..., classes)."""
        weight, bias = self.linear.weight, self.linear.bias
        if self.cosine_scale is not None:
            features, weight = _cosine_factors(features, weight, self.cosine_scale)
        return F.linear(features, weight, bias)
