"""A second process that holds the upper half of the classes, for what is measured on two.

It is started once, gloo between the two, and does its half of every call: the last layer's loss and both gradients.
Each process has half the threads, and at least one. Problems are made on both sides, so that nothing is sent but what
the loss itself sends.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import socket
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import topk
from bench.contenders import Setting, criterion

_PATIENCE = datetime.timedelta(minutes=3)
"""For a message: where one process fails, the other does not wait for ever."""


def half(setting: Setting, rank: int) -> Tensor:
    """The weight of a process's classes."""
    weight = setting.weight().detach()
    return weight.tensor_split(2)[rank].clone().requires_grad_()


def loss_of_half(setting: Setting, features: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The loss of all classes; its gradient in the features is whole, that in the weight of this half."""
    start = torch.distributed.get_rank() * (setting.classes - setting.classes // 2)
    shard = topk.ClassShard(start, setting.classes)
    return topk.linear_loss(criterion(setting), features, weight, target, shard=shard)


class Partner:
    """The other process; `at_work` has it do its half beside what is done here."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        context = torch.multiprocessing.get_context("spawn")
        self._calls, theirs = context.Pipe()
        self.threads = max(1, torch.get_num_threads() // 2)
        self._process = context.Process(target=_serve, args=(theirs, address, self.threads), daemon=True)
        self._process.start()
        torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=2, timeout=_PATIENCE)

    @contextlib.contextmanager
    def at_work(self, setting: Setting, rows: int) -> Iterator[None]:
        """Both processes have half the threads meanwhile; what fails there is raised here."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        self._calls.send((setting, rows))
        try:
            yield
            failure = self._calls.recv()
        finally:
            torch.set_num_threads(before)
        if failure is not None:
            raise RuntimeError(f"the second process failed: {failure}")

    def close(self) -> None:
        """Ends the other process, and the group of the two: who comes after works alone again."""
        torch.distributed.destroy_process_group()
        self._process.kill()
        self._process.join()
        partner.cache_clear()


@functools.cache
def partner() -> Partner:
    """One for all that is measured in this process."""
    return Partner()


def _serve(calls: Any, address: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.distributed.init_process_group("gloo", init_method=address, rank=1, world_size=2, timeout=_PATIENCE)

    @functools.lru_cache(maxsize=1)
    def problem(setting: Setting, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        features, target = setting.problem(rows)
        return features.requires_grad_(), target, half(setting, 1)

    with contextlib.suppress(EOFError):
        while True:
            setting, rows = calls.recv()
            try:
                features, target, weight = problem(setting, rows)
                torch.autograd.grad(loss_of_half(setting, features, target, weight), (features, weight))
                calls.send(None)
            except Exception as error:
                calls.send(f"{type(error).__name__}: {error}")
