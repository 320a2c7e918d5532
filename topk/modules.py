"""nn.Module shells over `topk.functional`: same keywords, checked when constructed, buffers that follow `.to`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from topk import functional
from topk.arguments import KArgument, check_k


class _Loss(nn.Module):
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
        self._check()

    def keywords(self) -> dict[str, Any]:
        """The keywords of the functional form, as they stand now."""
        return {name: getattr(self, name) for name in self._names}

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """The loss of these scores, as the functional form computes it."""
        return type(self).function(scores, target, **self.keywords())

    def _check(self) -> None:
        """Meets bad keywords here rather than at the first batch: an empty batch runs every check."""
        keywords = self.keywords()
        tensors = [value for value in keywords.values() if isinstance(value, Tensor) and value.dim() == 1]
        ks = check_k(keywords["k"])[0] if "k" in keywords else [1]
        classes = tensors[0].shape[0] if tensors else max(ks) + 1
        generator = keywords.get("generator")
        state = generator.get_state() if isinstance(generator, torch.Generator) else None
        device = tensors[0].device if tensors else generator.device if state is not None else None
        with torch.no_grad():
            type(self).function(
                torch.zeros(0, classes, device=device), torch.zeros(0, dtype=torch.int64, device=device), **keywords
            )
        if state is not None:
            generator.set_state(state)

    def extra_repr(self) -> str:
        """Every keyword that has a value, tensors by their shape."""
        shown = []
        for name, value in self.keywords().items():
            if isinstance(value, Tensor):
                shown.append(f"{name}=Tensor{tuple(value.shape)}")
            elif value is not None:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)


class SmoothTopKLoss(_Loss):
    """Module form of :func:`topk.smooth_topk_loss`."""

    function = staticmethod(functional.smooth_topk_loss)

    def __init__(
        self,
        k: KArgument = 5,
        *,
        tau: float = 1.0,
        margin: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())
