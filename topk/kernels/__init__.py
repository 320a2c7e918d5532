"""The losses' kernels in Triton, one file a room, imported only when one of them runs.

A kernel room `topk.kernels.<room>` offers what follows; `topk.ops` calls it in the place of the torch room.

    saved(rows, classes, options) -> tuple[SavedShape, ...]
        Shapes and types of what forward saves: O(k) a row, a row of each tensor for every row of the scores.
        None as a type means float32.
    forward(scores, target, extras, ignore_index, options) -> (loss, *saved)
        loss (rows,) in float32.
    backward(grad, scores, target, extras, saved, ignore_index, options) -> gradient
        grad (rows,) float32 may have stride 0. The gradient of sum(grad * loss), contiguous, in the scores' type,
        computed in float32 and rounded once.
    examples(rows, classes, device) -> list[(extras, options)]
        A few calls that between them reach every path of the kernels: for the check of a device on first use and for
        the tests that compile without one. Their losses must be those of the torch path (no noise worth mentioning).
    why_not(absent) -> str | None                                                           (optional)
        What no kernel serves when those options are None (a bool an option), in words; without it, all are served.
    for_formula(scores, target, extras, saved, ignore_index, options) -> saved tensors      (optional)
        What the torch room's formula needs for second derivatives. Without it the torch room's forward runs again,
        which is right wherever forward draws no random numbers.

scores: float32, float16 or bfloat16 of shape (rows, classes), any strides, read where they lie. target: int64
(rows,), raw. A kernel treats ignored rows (loss 0, gradient 0 whatever grad and scores hold) and wrong targets (loss
and gradient NaN) itself, so that nothing passes over the gradient a second time. It writes every element of its
results, never an input, keeps offsets in int64, and nothing waits for the device. Rows may be 0; a list of ks may be
empty, which `common.no_loss` and `common.no_gradient` answer. Everything is launched by `common.launch`, which is how
`resources` learns what to compile; several ks and weights are constants of the kernel, as `common.packed` makes them.

Special values are those of the torch rooms: of tied scores the lower class wins; -inf is a masked class, with gradient
0; NaN or +inf makes its own row NaN; fewer than k finite wrong scores and an impossible target as each room says.
"""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("smooth", "transition", "noised", "differentiable", "hinge")
"""The rooms that have kernels."""


def of(name: str) -> ModuleType:
    """The module with a loss's kernels; imports triton."""
    return importlib.import_module(f"topk.kernels.{name}")
