"""How much memory a call needs beyond what it was given, from the allocator's own events."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notices would tear every progress bar

from torch.profiler import ProfilerActivity, profile


def peak_temporaries(call: Callable[[], Any]) -> int:
    """The largest number of bytes alive at once that `call` allocated on the CPU, its results included."""
    call()  # what is allocated once and kept is not a temporary
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        result = call()
    del result
    events = [event for event in watch.profiler.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler reported no allocation: this torch cannot measure memory")
    events.sort(key=lambda event: event.start_ns())
    return int(max(0, *itertools.accumulate(event.nbytes() for event in events)))
