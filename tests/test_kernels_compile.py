"""Every kernel goes through Triton's compiler as far as machine code, which takes no GPU, and registers suffice."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from functools import cache

import pytest

from topk import kernels
from topk.kernels.resources import COLUMNS

# The interpreter accepts more than the compiler does, and a process is either one or the other.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@cache  # one process compiles for several tests
def _compiled(*arguments: str) -> list[dict[str, str]]:
    command = [sys.executable, "-m", "topk.kernels.resources", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(COLUMNS)
    return list(csv.DictReader(done.stdout.splitlines()))


def _check(rows: list[dict[str, str]]) -> None:
    print(*({**row, "constants": row["constants"][:60]} for row in rows), sep="\n")
    assert len(rows) >= 2
    for row in rows:
        # Below the most registers a thread can have, a dozen words spilled are the assembler's choice, for occupancy.
        assert int(row["spilled"]) <= (48 if int(row["registers"]) < 255 else 0), row
        assert int(row["registers"]) * int(row["threads"]) <= 65536, row  # otherwise a program could not start
        assert int(row["shared"]) <= 48 * 1024, row


@pytest.mark.parametrize("loss", kernels.NAMES + kernels.OPERATORS)
def test_kernels_compile_for_capability_9(loss: str) -> None:
    found = _compiled("--classes", "20000", "--types", "bfloat16", "--capabilities", "90")
    _check([row for row in found if row["loss"] == loss])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", ["75", "80", "90"])
@pytest.mark.parametrize("loss", kernels.NAMES + kernels.OPERATORS)
def test_kernels_compile_for_every_size_type_and_capability(loss: str, capability: str) -> None:
    sizes = ["--classes", "10", "33", "101", "1000", "8192", "20001"]
    _check(_compiled(loss, *sizes, "--types", "float32", "float16", "bfloat16", "--capabilities", capability))


@pytest.mark.parametrize(
    ("loss", "capability"),
    [
        ("transition", "90"),
        ("transition", "75"),
        ("hinge", "90"),
    ],
)
@pytest.mark.slow
def test_kernels_for_rows_that_are_split_compile(loss: str, capability: str) -> None:
    rows = _compiled(loss, "--classes", "70000", "--types", "bfloat16", "--capabilities", capability)
    assert any(row["kernel"] == "_scan_part" for row in rows)
    _check(rows)
