"""How good a classifier with k guesses is: ranks, top-k accuracies for all k at once, candidates needed (chapter 13).

The rank of a row is the place of its target when the classes are listed by falling score, the lower class index
first among equals (the losses' rule):

    rank = 1 + #{j: x_j > x_y} + #{j < y: x_j = x_y}.

The row is a *hit* for k guesses when rank <= k, so accuracy grows with k by construction. A row with NaN anywhere is
never a hit: its rank is classes + 1. Infinite scores are compared like all others; a masked target (-inf) comes after
every finite score. Half types are compared as they are, so ranks are exact for every type.

Shapes are those of the losses: scores (classes,), (rows, classes) or (rows, classes, d1, ...), targets as class
indices, rows whose target is `ignore_index` count for nothing. No rows give NaN.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from topk import _cpu
from topk.arguments import check_count, check_ignore_index, check_number, check_scores, check_targets
from topk.losses.common import as_rows
from topk.shards import ClassShard, held, sliced_ranks

__all__ = [
    "TopKMeter",
    "autkc",
    "candidates_for",
    "group_topk_accuracy",
    "macro_topk_accuracy",
    "ranks",
    "shot_groups",
    "topk_accuracy",
    "topk_curve",
]

_FLOAT32_COUNTS = 2**24  # up to here float32 counts exactly


# --- ranks -----------------------------------------------------------------------------------------------------------


def ranks(scores: Tensor, target: Tensor, *, ignore_index: int = -100, shard: ClassShard | None = None) -> Tensor:
    """The rank of every row's target, 1 for the largest score; int64, in the shape of `target`.

    Ignored rows get classes + 1, as rows with NaN do; so does, on devices other than the CPU, a row whose target is
    no class (on the CPU it raises).

    Args:
        scores: (classes,), (rows, classes) or (rows, classes, d1, ...), any floating-point type.
        target: class indices.
        ignore_index: rows with this target have no rank.
        shard: which classes the scores (rows, classes of the slice) are, where processes share them; a DTensor with
            Shard(-1) needs none.
    """
    if shard is None:
        scores, shard = held(scores)
    if shard is not None:
        rank, valid = sliced_ranks(scores.detach(), target, shard, check_ignore_index(ignore_index))
        return rank.masked_fill(~valid, shard.total + 1)
    classes = check_scores(scores, target)
    rows, flat = as_rows(scores.detach(), target)
    rank, valid = _rank_rows(rows, flat, check_ignore_index(ignore_index))
    return rank.masked_fill(~valid, classes + 1).reshape(target.shape)


def _rank_rows(rows: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Ranks (rows,) and which rows have a valid target; the ranks of the others mean nothing."""
    state, _ = check_targets(target, rows.shape[1], ignore_index)
    valid, safe = state >= 0, state.clamp(min=0)
    parts = [_rank_chunk(rows[part], safe[part]) for part in _cpu.chunks(rows)]
    return torch.cat(parts) if parts else safe, valid


def _rank_chunk(rows: Tensor, target: Tensor) -> Tensor:
    classes = rows.shape[1]
    own = rows.gather(1, target[:, None])
    # Summing 0s and 1s as floats is three times as fast as summing booleans.
    count_type = torch.float32 if classes <= _FLOAT32_COUNTS or rows.device.type == "mps" else torch.float64
    marks = torch.empty(rows.shape, dtype=count_type, device=rows.device)
    above = torch.gt(rows, own, out=marks).sum(1)
    tied = torch.ge(rows, own, out=marks).sum(1) - above > 1
    rank = above.to(torch.int64) + 1
    if not rows.is_cpu:
        rank += _tied_before(rows, own, target)
    elif bool(tied.any()):
        rank[tied] += _tied_before(rows[tied], own[tied], target[tied])
    return rank.masked_fill_(rows.amax(1).isnan(), classes + 1)


def _tied_before(rows: Tensor, own: Tensor, target: Tensor) -> Tensor:
    before = torch.arange(rows.shape[1], device=rows.device) < target[:, None]
    return ((rows == own) & before).sum(1)


# --- one call --------------------------------------------------------------------------------------------------------


def topk_accuracy(
    scores: Tensor,
    target: Tensor,
    ks: int | Iterable[int] = (1, 5),
    *,
    ignore_index: int = -100,
    shard: ClassShard | None = None,
) -> dict[int, Tensor]:
    """The share of rows whose target is among the k largest scores, for every k of `ks`: {k: scalar tensor}.

    All from one pass over the scores, in float64 on their device, without waiting for it. No rows give NaN. `shard`: as
    for `ranks`.
    """
    if shard is None:
        scores, shard = held(scores)
    if shard is not None:
        rank, rows = ranks(scores, target, ignore_index=ignore_index, shard=shard), (target != ignore_index).sum()
        return {k: _share((rank <= k).sum(), rows) for k in _check_ks(ks, shard.total)}
    return _measured(scores, target, ks, ignore_index, by_class=False).accuracy()


def topk_curve(scores: Tensor, target: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Top-k accuracy for k = 1, 2, ..., classes, as one float64 tensor."""
    return _measured(scores, target, (), ignore_index, by_class=False).curve()


def autkc(
    scores: Tensor, target: Tensor, ks: int | Iterable[int] = (5,), *, ignore_index: int = -100
) -> dict[int, Tensor]:
    """The area under the top-k curve up to k (Wang et al. 2023), the mean of top-1 ... top-k accuracy, for every k of
    `ks`: {k: scalar tensor}; chapter 23. A row of rank r adds max(0, k + 1 - r) / k.
    """
    curve = topk_curve(scores, target, ignore_index=ignore_index)
    return {k: curve[:k].mean() for k in _check_ks(ks, len(curve))}


def macro_topk_accuracy(
    scores: Tensor, target: Tensor, ks: int | Iterable[int] = (1, 5), *, ignore_index: int = -100
) -> dict[int, Tensor]:
    """Top-k accuracy of every class that occurs in `target`, averaged over these classes: {k: scalar tensor}."""
    return _measured(scores, target, ks, ignore_index, by_class=True).macro()


def group_topk_accuracy(
    scores: Tensor,
    target: Tensor,
    groups: Tensor | Sequence[Hashable],
    ks: int | Iterable[int] = (1, 5),
    *,
    macro: bool = False,
    ignore_index: int = -100,
) -> dict[Hashable, dict[int, Tensor]]:
    """Top-k accuracy within groups of classes: {group: {k: scalar tensor}}, groups in order of first appearance.

    `groups` names the group of every class (see `shot_groups`). A group's accuracy is over its rows, or with
    `macro=True` the average over its classes that occur.
    """
    return _measured(scores, target, ks, ignore_index, by_class=True).by_group(groups, macro=macro)


def candidates_for(scores: Tensor, target: Tensor, accuracy: float = 0.99, *, ignore_index: int = -100) -> int:
    """The smallest k whose top-k accuracy is at least `accuracy`: how many candidates a user has to be shown.

    classes + 1 where even k = classes does not reach it, which only rows with NaN can cause.
    """
    return _measured(scores, target, (), ignore_index, by_class=False).candidates(accuracy)


def _measured(scores: Tensor, target: Tensor, ks: int | Iterable[int], ignore_index: int, by_class: bool) -> TopKMeter:
    classes = check_scores(scores, target)
    meter = TopKMeter(classes, ks, by_class=by_class, ignore_index=ignore_index, device=scores.device)
    return meter.update(scores, target)


def shot_groups(counts: Tensor | Sequence[int], many: int = 100, few: int = 20) -> list[str]:
    """Group of every class by its number of training examples: "many" above `many`, "few" below `few`, else "medium".

    The bounds 100 and 20 are those customary for long-tailed data (Liu et al. 2019).
    """
    if check_count("many", many) < check_count("few", few, least=0):
        raise ValueError(f"many must be at least few, got many={many}, few={few}")
    numbers = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    return ["many" if count > many else "few" if count < few else "medium" for count in numbers]


# --- streaming -------------------------------------------------------------------------------------------------------


class TopKMeter:
    """Counts ranks over batches and processes; every accuracy afterwards comes from these counts.

    The counts are integers, so any partition of the rows gives the same numbers to the last bit. They take
    8 bytes times classes times (2 + len(ks)); with `by_class=False` 8 bytes times classes::

        meter = TopKMeter(classes=1000, ks=(1, 5, 20))
        for scores, target in batches:
            meter.update(scores, target)
        total = meter.reduce()              # the sum over all processes; a copy where there is only one
        total.accuracy()[5], total.candidates(0.99), total.macro()[5]

    Args:
        classes: the number of classes.
        ks: the numbers of guesses for which every class is counted; `accuracy` and `curve` know every k anyway.
        by_class: False drops the counts a class, and with them `per_class`, `macro` and `by_group`.
        ignore_index: rows with this target count for nothing.
        device: where the counts live; None follows the first scores. Updating with scores on that device waits for
            nothing.
    """

    def __init__(
        self,
        classes: int,
        ks: int | Iterable[int] = (1, 5),
        *,
        by_class: bool = True,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
    ) -> None:
        self.classes = check_count("classes", classes)
        self.ks = _check_ks(ks, self.classes)
        self.by_class = bool(by_class)
        self.ignore_index = check_ignore_index(ignore_index)
        self._follow = device is None
        self._counts = torch.zeros(self._size(), dtype=torch.int64, device=device)

    # One flat tensor, so that merging, reducing and saving are one operation each:
    # ranks 0..classes+1 (0 stays empty), then, if by_class, rows a class and hits a class for each of ks.

    def _size(self) -> int:
        return self.classes + 2 + (self.classes * (1 + len(self.ks)) if self.by_class else 0)

    def _histogram(self) -> Tensor:
        return self._counts[: self.classes + 2]

    def _table(self) -> Tensor:
        """(1 + len(ks), classes): rows, then hits."""
        if not self.by_class:
            raise RuntimeError("this meter does not count classes: make it with by_class=True")
        return self._counts[self.classes + 2 :].view(1 + len(self.ks), self.classes)

    @property
    def device(self) -> torch.device:
        """Where the counts live."""
        return self._counts.device

    @property
    def rows(self) -> int:
        """How many rows were counted (waits for the device)."""
        return int(self._histogram().sum())

    def update(self, scores: Tensor, target: Tensor) -> TopKMeter:
        """Counts a batch; returns the meter itself."""
        classes = check_scores(scores, target)
        if classes != self.classes:
            raise ValueError(f"scores must have {self.classes} classes, as the meter, got {classes}")
        rows, flat = as_rows(scores.detach(), target)
        rank, valid = _rank_rows(rows, flat, self.ignore_index)
        if self._follow:
            self._follow = False
            self.to(scores.device)
        counted = (flat != self.ignore_index).to(self.device, torch.int64)
        rank = torch.where(valid, rank, classes + 1).to(self.device)
        self._histogram().scatter_add_(0, rank, counted)
        if self.by_class:
            self._count_classes(torch.where(valid, flat, 0).to(self.device), rank, valid.to(self.device))
        return self

    def _count_classes(self, target: Tensor, rank: Tensor, valid: Tensor) -> None:
        table = self._table()
        table[0].scatter_add_(0, target, valid.to(torch.int64))
        for hits, k in zip(table[1:], self.ks, strict=True):
            hits.scatter_add_(0, target, (valid & (rank <= k)).to(torch.int64))

    def merge(self, other: TopKMeter) -> TopKMeter:
        """Adds what `other` has counted; returns the meter itself."""
        if not isinstance(other, TopKMeter):
            raise TypeError(f"other must be a TopKMeter, got {type(other).__name__}")
        if other._settings() != self._settings():
            raise ValueError(f"other must have the settings {self._settings()}, got {other._settings()}")
        self._counts += other._counts.to(self.device)
        return self

    def reduce(self, group: Any = None) -> TopKMeter:
        """A new meter with the sum over the processes of torch.distributed; a copy where there is only one.

        This one keeps its own counts, so it can go on and be reduced again. The counts must live on a device the
        process group serves (CUDA for nccl, the CPU for gloo).
        """
        total = copy.deepcopy(self)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total._counts, torch.distributed.ReduceOp.SUM, group=group)
        return total

    def reset(self) -> TopKMeter:
        """Forgets all rows; returns the meter itself."""
        self._counts.zero_()
        return self

    def to(self, device: torch.device | str) -> TopKMeter:
        """Moves the counts; returns the meter itself."""
        self._follow = False
        self._counts = self._counts.to(device)
        return self

    def _settings(self) -> dict[str, Any]:
        return {"classes": self.classes, "ks": self.ks, "by_class": self.by_class, "ignore_index": self.ignore_index}

    def state_dict(self) -> dict[str, Any]:
        """Settings and a copy of the counts."""
        return {**self._settings(), "counts": self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over the counts of a meter with the same settings."""
        settings = {name: state[name] for name in self._settings()}
        if settings != self._settings():
            raise ValueError(f"state must have the settings {self._settings()}, got {settings}")
        self._counts = state["counts"].to(self.device, torch.int64, copy=True)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"TopKMeter({settings}, device={str(self.device)!r})"

    def curve(self) -> Tensor:
        """Top-k accuracy for k = 1, 2, ..., classes (classes,)."""
        return _curve(self._histogram())

    def accuracy(self, ks: int | Iterable[int] | None = None) -> dict[int, Tensor]:
        """Top-k accuracy, {k: scalar tensor}, for any `ks` (None: those of the meter)."""
        curve = self.curve()
        return {k: curve[k - 1] for k in (self.ks if ks is None else _check_ks(ks, self.classes))}

    def candidates(self, accuracy: float = 0.99) -> int:
        """The smallest k whose top-k accuracy is at least `accuracy`; classes + 1 where no k reaches it.

        Hits over rows, correctly rounded, are compared with `accuracy`: 99 of 100 do reach 0.99, 7 of 100 do reach
        0.07, although neither decimal is a binary fraction.
        """
        accuracy = check_number("accuracy", accuracy, above=0.0, most=1.0)
        histogram = self._histogram().cpu()
        if not bool(histogram.any()):
            raise ValueError("candidates needs at least one row, got none")
        return int((_curve(histogram) < accuracy).sum()) + 1

    def per_class(self, ks: int | Iterable[int] | None = None) -> dict[int, Tensor]:
        """Top-k accuracy of every class, {k: (classes,)}, NaN where it did not occur. `ks`: some of the meter's."""
        table = self._table()
        return {k: _share(table[1 + place], table[0]) for k, place in self._places(ks).items()}

    def macro(self, ks: int | Iterable[int] | None = None) -> dict[int, Tensor]:
        """The average of `per_class` over the classes that occurred, {k: scalar tensor}."""
        return {k: shares.nanmean() for k, shares in self.per_class(ks).items()}

    def by_group(
        self, groups: Tensor | Sequence[Hashable], ks: int | Iterable[int] | None = None, *, macro: bool = False
    ) -> dict[Hashable, dict[int, Tensor]]:
        """{group: {k: scalar tensor}}: as `group_topk_accuracy`. `ks`: some of the meter's."""
        table, places = self._table(), self._places(ks)
        result: dict[Hashable, dict[int, Tensor]] = {}
        for group, members in _group_members(groups, self.classes).items():
            rows, *hits = table[:, members.to(self.device)]
            chosen = {k: hits[place] for k, place in places.items()}
            result[group] = {
                k: _share(hit, rows).nanmean() if macro else _share(hit.sum(), rows.sum()) for k, hit in chosen.items()
            }
        return result

    def _places(self, ks: int | Iterable[int] | None) -> dict[int, int]:
        """Where in the table each of the wanted ks stands."""
        wanted = self.ks if ks is None else _check_ks(ks, self.classes)
        for k in wanted:
            if k not in self.ks:
                raise ValueError(f"ks must be among those the meter counts by class, {self.ks}, got {k}")
        return {k: self.ks.index(k) for k in wanted}


def _curve(histogram: Tensor) -> Tensor:
    """Top-k accuracy for every k from the counts of the ranks 0..classes+1."""
    return _share(histogram[1:-1].cumsum(0), histogram.sum())


def _share(hits: Tensor, rows: Tensor) -> Tensor:
    """hits / rows in float64 (float32 on devices without it); NaN where there are no rows."""
    dtype = torch.float32 if hits.device.type == "mps" else torch.float64
    return hits.to(dtype) / rows.to(dtype)


def _check_ks(ks: int | Iterable[int], classes: int) -> tuple[int, ...]:
    wanted = tuple(ks) if isinstance(ks, Iterable) else (ks,)
    for k in wanted:
        if check_count("every k of ks", k) > classes:
            raise ValueError(f"every k of ks must be at most the number of classes, {classes}, got {k}")
    return tuple(dict.fromkeys(int(k) for k in wanted))


def _group_members(groups: Tensor | Sequence[Hashable], classes: int) -> dict[Hashable, Tensor]:
    if isinstance(groups, str | Mapping) or not isinstance(groups, Tensor | Sequence):
        raise TypeError(f"groups must be a tensor or a sequence with the group of every class, got {groups!r}")
    names = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(names) != classes:
        raise ValueError(f"groups must name the group of each of the {classes} classes, got {len(names)} entries")
    members: dict[Hashable, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(name, []).append(index)
    return {name: torch.tensor(indices) for name, indices in members.items()}
