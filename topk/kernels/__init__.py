"""The kernels in Triton, one file a loss or operator, imported only when one of them runs.

`topk.kernels.<loss>` offers what follows; `topk.autograd` calls it in the place of the loss's own forward and backward.
`options` is the loss's NamedTuple, and `tensors` are those that it takes besides, as `topk.autograd.Loss` has them.

    saved(rows, classes, options) -> tuple[SavedShape, ...]
        Shapes and types of what forward saves: O(k) a row, a row of each tensor for every row of the scores.
        None as a type means float32.
    forward(scores, target, options, ignore_index, *tensors) -> (loss, *saved)
        loss (rows,) in float32.
    backward(grad, scores, target, options, ignore_index, saved, *tensors) -> gradient
        grad (rows,) float32 may have stride 0. The gradient of sum(grad * loss), contiguous, in the scores' type,
        computed in float32 and rounded once.
    examples(rows, classes, device) -> list[(tensors, options)]
        A few calls that between them reach every path of the kernels: for the check of a device on first use and for
        the tests that compile without one. Their losses must be those of the torch path (no noise worth mentioning).
    why_not(absent) -> str | None                                                           (optional)
        What no kernel serves when those options are None (a bool an option), in words; without it, all are served.

scores: float32, float16 or bfloat16 of shape (rows, classes), any strides, read where they lie. target: int64
(rows,), raw. A kernel treats ignored rows (loss 0, gradient 0 whatever grad and scores hold) and wrong targets (loss
and gradient NaN) itself, so that nothing passes over the gradient a second time. It writes every element of its
results, never an input, keeps offsets in int64, and nothing waits for the device. Rows may be 0; ks ascend, and there
is at least one. Everything is launched by `common.launch`, which is how `resources` learns what to compile; several ks
and weights are constants of the kernel.

Special values are those of the torch path: of tied scores the lower class wins; -inf is a masked class, with gradient
0; NaN or +inf makes its own row NaN; fewer than k finite wrong scores and an impossible target as each loss says.
"""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("smooth", "transition", "noised", "differentiable", "hinge")
"""The losses that have kernels."""

OPERATORS = ("threshold", "subset")
"""The soft top-k operators that do; in each file `forward` is the operator, and `trial(scores)` launches everything."""


def of(name: str) -> ModuleType:
    """The module with a loss's or an operator's kernels; imports triton."""
    return importlib.import_module(f"topk.kernels.{name}")
