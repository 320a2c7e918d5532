"""One process, or several that `torchrun` started: who is who, sums over all, and a model that trains on all of them.

Gradients, batch statistics and metrics are those of one process with the whole batch, within rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

__all__ = ["Processes", "joined"]


@dataclass(frozen=True)
class Processes:
    """This process among `count`, and the device it works on."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def same(self, value: Any) -> Any:
        """The first process's value, on all of them."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def shared(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over the processes and whose batch statistics are common to them."""
        if self.count == 1:
            return model
        if self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            return nn.parallel.DistributedDataParallel(model, device_ids=[self.device], broadcast_buffers=False)
        for layer in model.modules():
            if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d):
                layer.__class__ = _SharedBatchNorm  # same parameters and buffers, another forward
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


@contextmanager
def joined(device: str | None = None) -> Iterator[Processes]:
    """This process's place: among torchrun's processes if its environment variables say so, else alone.

    A process group that exists is used as it is; one that is made here ends with the block.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place == "cuda":
        place = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if count > 1 else f"cuda:{torch.cuda.current_device()}"
    where = torch.device(place)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    exists = distributed.is_available() and distributed.is_initialized()
    if count > 1 and not exists:
        distributed.init_process_group("nccl" if where.type == "cuda" else "gloo")
    try:
        if count > 1 or exists:
            yield Processes(where, distributed.get_rank(), distributed.get_world_size())
        else:
            yield Processes(where)
    finally:
        if count > 1 and not exists:
            distributed.destroy_process_group()


class _Total(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        total: Tensor = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


class _SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over the rows of all processes, on the CPU, for which torch's SyncBatchNorm is not made."""

    def _check_input_dim(self, input: Tensor) -> None:  # the base class asks for it
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        axes = [0, *range(2, input.dim())]
        wide = input.double()
        rows = wide.new_full((1,), input.numel() // input.shape[1])
        sums = _Total.apply(torch.cat([wide.sum(axes), (wide * wide).sum(axes), rows]))
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        variance = square - mean * mean
        self._remember(mean.detach(), (variance * sums[-1] / (sums[-1] - 1)).detach())
        shape = (1, -1) + (1,) * (input.dim() - 2)
        factor = self.weight * (variance + self.eps).rsqrt()
        result: Tensor = wide * factor.view(shape) + (self.bias - mean * factor).view(shape)
        return result.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)
