"""Times and memory of things that are compared, on the CPU or on a CUDA device (chapter 13).

What is compared is called in turns, so that whatever else the machine does falls on all alike. A clock knows its
device:

    clock = clock_of("cpu")
    times = in_turns(clock, {"ours": work, "theirs": other_work}, seconds=1.0)
    quantiles(times["ours"])["p50_ms"], clock.peak(work)
"""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its notices would tear every progress bar

import torch
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], Any]

ROUNDS = (5, 40)
"""At least and at most so many turns each."""
_CACHES = 4
"""Before every call so many times the second-level cache is written, so that none finds its input there."""
_CPU_CACHES = 2**25
"""Bytes written for that on the CPU: more than its cores' second-level caches hold together."""
_FREED = 2**24
"""Bytes freed once: the C library then keeps small tensors' memory, as it does once a network has freed a large one.

In a process that never had one it returns some megabytes to the system and asks for them again, by chance of the order
of the calls: a thousand page faults, up to a millisecond, for one contender and none for the next.
"""


class NoReplayError(RuntimeError):
    """The work cannot be captured in a CUDA graph; the message says why."""


class CpuClock:
    """Wall time from cold second-level caches, as in training, where a network has just run between two losses.

    Without this a contender's time depends on its neighbours: F.cross_entropy took twice as long after a loss that
    moves fifty megabytes as after one that moves two. `warm`: the second of two calls in a row instead, which finds its
    input, its memory and its code in the caches, as in the loops with which people usually compare losses.

    `timer`: `time.process_time` tells the seconds in which this process was at work, on whichever of its threads. With
    one thread that is what a quiet machine's clock would tell, less the time for which another process is waited for.
    """

    def __init__(self, warm: bool = False, timer: Callable[[], float] = time.perf_counter) -> None:
        self.device = torch.device("cpu")
        self._warm, self._timer = warm, timer
        self._other_data = torch.empty(0 if warm else _CPU_CACHES, dtype=torch.int8)
        torch.empty(_FREED, dtype=torch.int8)

    def time(self, work: Work) -> float:
        """Milliseconds of one call, with all that a caller waits for."""
        if self._warm:
            work()
        self._other_data.zero_()
        start = self._timer()
        work()
        return 1e3 * (self._timer() - start)

    def peak(self, work: Work) -> int:
        """See `peak_temporaries`; what is timed has been called before."""
        return peak_temporaries(work, first=False)

    def replay(self, work: Work) -> Work:
        """There is nothing to capture."""
        raise NoReplayError("a CPU has no graphs")

    def facts(self) -> dict[str, str]:
        """The processor's name."""
        from topk_lab.train import hardware

        return {"processor": hardware()["cpu"], "driver": "", "triton": ""}


def peak_temporaries(work: Work, first: bool = True) -> int:
    """The largest number of bytes alive at once that `work` allocated on the CPU, from the allocator's own events."""
    if first:
        work()  # what is allocated once and kept is not a temporary
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        probe = torch.empty(1, dtype=torch.int8)
        del probe  # an allocation that must be seen, should the work make none
        result = work()
    del result
    events = [event for event in watch.profiler.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        raise RuntimeError("the profiler reported no allocation: this torch cannot measure memory")
    events.sort(key=lambda event: event.start_ns())
    return int(max(itertools.accumulate((event.nbytes() for event in events[2:]), initial=0)))


class CudaClock:
    """The device's own events, from an idle device with a cold second-level cache.

    Because the device is idle when the first event is recorded, an eager call's time holds Python and every launch,
    whole; a replayed graph's holds the device's work alone.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device = device
        self._cuda = cuda
        bytes_of_cache = cuda.get_device_properties(device).L2_cache_size
        self._other_data = torch.empty(_CACHES * bytes_of_cache, dtype=torch.int8, device=device)

    def time(self, work: Work) -> float:
        """Milliseconds between an event before the call and one after."""
        start, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
        self._other_data.zero_()
        self._cuda.synchronize(self.device)
        start.record()
        work()
        end.record()
        self._cuda.synchronize(self.device)
        return float(start.elapsed_time(end))

    def peak(self, work: Work) -> int:
        """The allocator's high-water mark above what was there before the call, results included."""
        work()
        self._cuda.synchronize(self.device)
        self._cuda.reset_peak_memory_stats(self.device)
        before = self._cuda.memory_allocated(self.device)
        result = work()
        self._cuda.synchronize(self.device)
        del result
        return int(self._cuda.max_memory_allocated(self.device)) - int(before)

    def replay(self, work: Work) -> Work:
        """The same work without Python and without launches: a CUDA graph, after three calls on a side stream."""
        try:
            side = self._cuda.Stream(self.device)
            side.wait_stream(self._cuda.current_stream(self.device))
            with self._cuda.stream(side):
                for _ in range(3):
                    work()
            self._cuda.current_stream(self.device).wait_stream(side)
            graph = self._cuda.CUDAGraph()
            with self._cuda.graph(graph):
                work()
            graph.replay()
            self._cuda.synchronize(self.device)
        except Exception as error:  # whatever a contender does that a capture forbids
            raise NoReplayError(f"{type(error).__name__}: {first_line(error)}") from error
        replay: Work = graph.replay
        return replay

    def facts(self) -> dict[str, str]:
        """The GPU's name, the driver's version and Triton's."""
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        except (OSError, subprocess.SubprocessError):
            driver = []
        try:
            triton = version("triton")
        except PackageNotFoundError:
            triton = ""
        name = self._cuda.get_device_name(self.device)
        return {"processor": name, "driver": driver[0] if driver else "unknown", "triton": triton}


Clock = CpuClock | CudaClock


def clock_of(device: str | torch.device) -> Clock:
    """The clock of a device."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device}")
    return CpuClock() if device.type == "cpu" else CudaClock(device)


def first_line(error: BaseException, length: int = 160) -> str:
    """What an error says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:length]


# --- taking turns ---


def in_turns(
    clock: Clock, works: Mapping[str, Work], seconds: float, rounds: tuple[int, int] = ROUNDS
) -> dict[str, list[float]]:
    """Milliseconds of every call: each work once a round, every other round in reverse order."""
    times: dict[str, list[float]] = {name: [] for name in works}
    start = time.perf_counter()
    for number in range(rounds[1]):
        if number >= rounds[0] and time.perf_counter() - start > seconds:
            break
        for name in list(works)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(clock.time(works[name]))
    return times


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """p20_ms, p50_ms, p80_ms and min_ms."""
    ranked = sorted(times)
    found = {f"p{p}_ms": ranked[min(len(ranked) - 1, p * len(ranked) // 100)] for p in (20, 50, 80)}
    return {**found, "min_ms": ranked[0]}


def times_of(works: Mapping[str, Work], baseline: str, rounds: int) -> dict[str, float]:
    """{name: median time over that of the baseline}, in turns on this machine's CPU or GPU (chapters 6 to 8)."""
    clock = clock_of("cuda" if torch.cuda.is_available() else "cpu")
    medians = {name: quantiles(found)["p50_ms"] for name, found in in_turns(clock, works, 60, (rounds, rounds)).items()}
    return {name: median / medians[baseline] for name, median in medians.items()}


def gigabytes_per_second(bytes_moved: float, milliseconds: float) -> float:
    """What moved so many bytes in that time."""
    return bytes_moved / milliseconds / 1e6
