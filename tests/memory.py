"""A meter of memory: how much a function holds at its peak beyond what it was given."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_temporaries(function: Callable[[], object]) -> int:
    """The most bytes that `function` held at one time on the CPU, as torch's allocator saw it, results included.

    A first call warms caches up and is not measured.
    """
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)
