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


class NoisedTopKLoss(_Loss):
    """Module form of :func:`topk.noised_topk_loss`; a tensor of margins becomes a buffer.

    The noise is drawn anew at every call, in evaluation mode too; ``samples=None`` draws none. A generator stays on
    its device and is not part of the state dict.
    """

    function = staticmethod(functional.noised_topk_loss)

    def __init__(
        self,
        k: KArgument = 5,
        *,
        epsilon: float = 1.0,
        samples: int | None = 5,
        margins: float | Tensor | None = None,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())
