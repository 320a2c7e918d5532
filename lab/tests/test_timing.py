"""Times over a baseline; the clocks themselves are tested beside the benchmark."""

from __future__ import annotations

import time

import pytest

from topk_lab.study import timing


def test_times_over_a_baseline() -> None:
    works = {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.02)}
    found = timing.times_of(works, "short", rounds=5)
    assert found["short"] == 1.0
    assert 4 < found["long"] < 15


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device must be cpu or cuda, got meta"):
        timing.clock_of("meta")
