"""What the losses share: the way from a public call to rows and back, selection with a rule for ties, the Module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topk import _cpu, backend
from topk.arguments import (
    REDUCTIONS,
    check_choice,
    check_class_tensor,
    check_ignore_index,
    check_k,
    check_number,
)
from topk.autograd import Call, Head, Loss, compute_dtype, is_traced, row_loss

# --- from a call to rows and back ------------------------------------------------------------------------------------


class PendingScores(Tensor):
    """Stands in for scores that no tensor holds: their shape, type and device, for a loss's checks, and no numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # what it gives is plain
    source: Callable[..., Tensor]
    chosen: Callable[[Tensor], PendingScores]
    held: tuple[Tensor, Any] | None
    leading: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None

    @classmethod
    def of(
        cls,
        like: Tensor,
        rows: int,
        classes: int,
        dtype: torch.dtype,
        source: Callable[..., Tensor],
        chosen: Callable[[Tensor], PendingScores],
        held: tuple[Tensor, Any] | None = None,
        leading: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None,
    ) -> PendingScores:
        """`source(call, target, tensors, share, reduction)` gives the rows' losses, or the sum of share times them.

        `chosen(rows)` stands in for these rows of the scores. Where slices are held: the one that is here with its
        `ClassShard`, and `leading(target, count)`, the largest scores in falling order and the target's.
        """
        scores = torch.zeros((), dtype=dtype, device=like.device).expand(rows, classes).as_subclass(cls)
        scores.source, scores.chosen, scores.held, scores.leading = source, chosen, held, leading
        return scores


def reduced_loss(
    loss: Loss,
    options: Any,  # the loss's own, as it declares them
    scores: Tensor,  # (classes,), (rows, classes) or (rows, classes, d1, ...)
    target: Tensor,  # the same without the classes
    *tensors: Tensor,
    **tail: Any,
) -> Tensor:
    """Flattens to rows, runs the loss where it can run, weights the rows and reduces; `tail`: what every loss takes."""
    weight, reduction = tail["weight"], tail["reduction"]
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("backend", tail["backend"], backend.BACKENDS)
    ignore_index = check_ignore_index(tail["ignore_index"])
    rows, flat = as_rows(scores, target)
    if weight is not None:
        weight = check_class_tensor("weight", weight, scores, rows.shape[1])
    absent = tuple(option is None for option in options)
    chosen = backend.choose(tail["backend"], scores.device, scores.dtype, loss.name, absent)
    if "ks" in loss.options._fields:
        if not loss.joint:
            options, tensors = _counting(options, tensors, rows.shape[1])
        if not options.ks:
            loss, chosen = NOTHING, "torch"
    call, used = Call(loss, options, ignore_index, chosen, by_itself=tail["backend"] is None), flat != ignore_index
    share = None if weight is None else _share(weight.to(compute_dtype(scores)), flat, used)
    if isinstance(rows, PendingScores):
        # What is compiled takes all scores at once.
        call = call._replace(backend="torch" if chosen == "compiled" else chosen, by_itself=False)
        value = rows.source(call, flat, tensors, share, reduction)
    else:
        value = row_loss(call, rows, flat, *tensors)
        value = value if share is None else torch.where(used, value * share, 0.0)
    if reduction == "none":
        return value.reshape(target.shape)
    total = value.sum()
    return total if reduction == "sum" else total / (used.sum() if share is None else share.sum())


def _share(weight: Tensor, target: Tensor, used: Tensor) -> Tensor:
    """The weight of every row's class (rows,), 0 where it has none."""
    valid = used & (target >= 0) & (target < weight.shape[0])
    return torch.where(valid, weight[torch.where(valid, target, 0)], 0.0)


def as_rows(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The scores as (rows, classes), the targets as (rows,) in int64: a narrower type would wrap in comparisons."""
    if scores.dim() == 1:
        scores = scores.unsqueeze(0)
    elif scores.dim() > 2:
        scores = scores.movedim(1, -1).reshape(-1, scores.shape[1])
    return scores, target.reshape(-1).to(torch.int64)


def _counting(options: Any, tensors: tuple[Tensor, ...], classes: int) -> tuple[Any, tuple[Tensor, ...]]:
    """Only the ks that count: not those of weight 0, nor all classes, among which every guess is right."""
    pairs = list(zip(options.ks, options.weights, strict=True))
    kept = [place for place, (k, weight) in enumerate(pairs) if k < classes and weight > 0.0]
    if len(kept) == len(pairs):
        return options, tensors
    options = options._replace(ks=[pairs[i][0] for i in kept], weights=[pairs[i][1] for i in kept])
    return options, tuple(tensor[:, kept] if tensor.dim() == 2 else tensor for tensor in tensors)


def _nothing(scores: Tensor, target: Tensor, *_: Tensor, **options: Any) -> Tensor:
    """0 for every row, and connected to the scores."""
    return torch.where(torch.ones_like(scores, dtype=torch.bool), 0.0, scores).sum(1)


NOTHING = Loss("nothing", tuple, _nothing, head=lambda options: Head(1, []), joint=True)
"""The loss of a call in which no k counts."""


def row_margins(margins: float | Tensor, scores: Tensor, target: Tensor) -> Tensor:
    """The margin of every row's class (rows,), without gradient; 0 where a row has no class."""
    rows, flat = as_rows(scores, target)
    dtype = compute_dtype(scores)
    if not isinstance(margins, Tensor):
        number = check_number("margins", margins, least=0.0)
        return torch.full(flat.shape, number, dtype=dtype, device=scores.device)
    margins = check_class_tensor("margins", margins, scores, rows.shape[1]).detach().to(dtype)
    used = (flat >= 0) & (flat < rows.shape[1])
    return torch.where(used, margins[torch.where(used, flat, 0)], 0.0)


# --- selection -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("topk::largest_classes", mutates_args=())
def _largest_classes(scores: Tensor, count: int) -> Tensor:
    return _cpu.ordered_topk(scores, count)[1].clone()


@_largest_classes.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty((scores.shape[0], count), dtype=torch.int64)


@_largest_classes.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], scores: Tensor, count: int) -> tuple[Tensor, int]:
    assert in_dims[0] is not None
    rows = scores.movedim(in_dims[0], 0)
    return _largest_classes(rows.flatten(0, 1), count).unflatten(0, rows.shape[:2]), 0


def largest_classes(scores: Tensor, count: int) -> Tensor:
    """The classes of the `count` largest scores (rows, count), descending, the lower class first among equals.

    For definitions: a constant to every derivative, one opaque step to a compiler.
    """
    classes: Tensor = _largest_classes(scores.detach(), count)
    return classes


def without_target(values: Tensor, classes: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Drops the target from the columns of a selection, or the last column where the target is not in it."""
    count = classes.shape[1]
    column = torch.arange(count, device=classes.device)
    # From the slot where the target sits, if it does, everything moves up by one.
    slot = torch.where(classes == target[:, None], column, count).amin(1, keepdim=True)
    passed = column[:-1] >= slot
    return torch.where(passed, values[:, 1:], values[:, :-1]), torch.where(passed, classes[:, 1:], classes[:, :-1])


def largest_wrong(scores: Tensor, target: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The `depth` largest scores among the classes other than the target, descending, and their indices.

    Which of several tied classes is returned first is left open: use it where ties cannot matter.
    """
    return without_target(*_cpu.largest(scores, depth + 1), target)


def largest_wrong_scores(scores: Tensor, target: Tensor, count: int) -> Tensor:
    """The `count` largest scores of classes other than the target (rows, count), differentiable; for definitions."""
    top = largest_classes(scores, count + 1)
    return without_target(scores.gather(1, top), top, target)[0]


def largest_wrong_and_own(scores: Tensor, target: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same and x_y (rows,), which one gather finds: so their gradients are scattered once."""
    top = largest_classes(scores, count + 1)
    values = scores.gather(1, torch.cat((top, target[:, None]), 1))
    return without_target(values[:, :-1], top, target)[0], values[:, -1]


# --- numbers of a row ------------------------------------------------------------------------------------------------


def materialised(numbers: Tensor) -> Tensor:
    """The same few numbers a row, in float64, which a compiler for the CPU writes down, and so their gradient.

    Else it would work them out again for every class. It fuses nothing into a product of matrices.
    """
    if not (is_traced(numbers) and numbers.device.type == "cpu"):
        return numbers
    return numbers @ torch.eye(numbers.shape[1], dtype=numbers.dtype, device=numbers.device)


def target_scores(scores: Tensor, target: Tensor) -> Tensor:
    """x_y, the score of every row's own class (rows,)."""
    return scores.gather(1, target[:, None]).squeeze(1)


def row_dtype(scores: Tensor) -> torch.dtype:
    """The type for a few numbers a row: float64 wherever the device has it, so that differences keep their digits."""
    return scores.dtype if scores.device.type == "mps" else torch.float64


def not_finite_above(*values: Tensor) -> Tensor:
    """True where any of the values is NaN or +inf: such a row's loss and gradient are NaN."""
    bad = ~(values[0] < torch.inf)
    for value in values[1:]:
        bad = bad | ~(value < torch.inf)
    return bad


def broken_rows(best: Tensor, own: Tensor) -> tuple[Tensor, Tensor] | None:
    """Where the loss is NaN and where it is +inf as y is masked; None where the CPU sees that all is finite."""
    if best.is_cpu and math.isfinite(float(best.sum()) + float(own.sum())):
        return None
    return not_finite_above(best, own), own == -torch.inf


def mended(broken: tuple[Tensor, Tensor], loss: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The loss (rows,) and the slopes (rows, few), in broken rows what they are there."""
    bad, impossible = broken
    loss = loss.masked_fill(impossible, torch.inf).masked_fill(bad, torch.nan)
    return loss, slopes.masked_fill(impossible[:, None], 0.0).masked_fill(bad[:, None], torch.nan)


def finite_or_zero(values: Tensor) -> Tensor:
    """A harmless stand-in for what is not finite, where the row's result is settled otherwise."""
    return torch.where(values.isfinite(), values, 0.0)


def centred(scores: Tensor) -> Tensor:
    """The scores less the largest of their row: formulas of differences lose digits far from 0."""
    return scores - finite_or_zero(scores.detach().amax(1))[:, None]


def log_sum_exp(scores: Tensor, keep: Tensor) -> Tensor:
    """log of the sum of exp(x) over the classes where `keep` is true; differentiable, -inf where there is none."""
    kept = scores.masked_fill(~keep, -torch.inf)
    some = kept.amax(1) > -torch.inf
    return torch.where(some, torch.where(some[:, None], kept, 0.0).logsumexp(1), -torch.inf)


def with_tail(log_sum: Tensor, tail: Tensor | None, shift: Tensor | float = 0.0) -> Tensor:
    """log(exp(log_sum) + S exp(shift)), S the sum (1, rows) over classes that are not listed, if there are any."""
    if tail is None:
        return log_sum
    some = tail[0] > 0.0
    beyond = torch.where(some, torch.where(some, tail[0], 1.0).log() + shift, 0.0)
    return torch.where(some, torch.logaddexp(log_sum, beyond), log_sum)


# --- the Module ------------------------------------------------------------------------------------------------------


class LossModule(nn.Module):
    """Keeps a loss's keywords: tensors as buffers, the rest as attributes of the same names."""

    function: ClassVar[Callable[..., Tensor]]

    def __init__(self, scope: dict[str, Any]) -> None:
        """Takes the `locals()` of the subclass's constructor: its keywords are the loss's keywords."""
        super().__init__()
        keywords = {name: value for name, value in scope.items() if name not in ("self", "__class__")}
        self._names = tuple(keywords)
        for name, value in keywords.items():
            if name == "weight" or isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._prepare()
        self._check()

    def _prepare(self) -> None:
        """What a subclass sets up before the keywords are checked."""

    def keywords(self) -> dict[str, Any]:
        """The keywords of the functional form, as they stand now."""
        return {name: getattr(self, name) for name in self._names}

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """The loss of these scores, as the functional form computes it."""
        return type(self).function(scores, target, **self.keywords())

    def _check(self) -> None:
        """Meets bad keywords here rather than at the first batch: an empty batch runs every check."""
        keywords = self.keywords()
        # Those with a number a class, not one a k.
        given_by_class = (keywords.get(name) for name in ("weight", "margins"))
        tensors = [value for value in given_by_class if isinstance(value, Tensor) and value.dim() == 1]
        ks = check_k(keywords["k"])[0] if "k" in keywords else [1]
        classes = tensors[0].shape[0] if tensors else max(ks) + 1
        given = keywords.get("generator")
        generator = given if isinstance(given, torch.Generator) else None
        state = generator.get_state() if generator is not None else None
        device = tensors[0].device if tensors else generator.device if generator is not None else None
        with torch.no_grad():
            type(self).function(
                torch.zeros(0, classes, device=device), torch.zeros(0, dtype=torch.int64, device=device), **keywords
            )
        if generator is not None and state is not None:
            generator.set_state(state)  # checking draws nothing from it

    def extra_repr(self) -> str:
        """Every keyword that has a value, tensors by their shape."""
        shown = []
        for name, value in ((name, getattr(self, name)) for name in self._names):
            if isinstance(value, Tensor):
                shown.append(f"{name}=Tensor{tuple(value.shape)}")
            elif value is not None:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)
