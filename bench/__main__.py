"""`python -m bench --suite SUITE` measures, for instance headline, operators, gpu; `... show`, `... ship` read records.

`python -m bench expect [FAMILY ...] [CLASSES ...]` works out, without a GPU, what the kernels should take on one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import runner, summary, tables
from bench.suites import SUITES

NO_DEVICE = 2
"""The exit status where a suite's device is not here."""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("action", nargs="?", default="run", choices=("run", "show", "ship"))
    parser.add_argument("--suite", default="smoke", choices=tuple(SUITES))
    parser.add_argument("--out", type=Path, default=runner.RESULTS, help="folder of the records (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the suite's own")
    parser.add_argument("--threads", type=int, help="torch's CPU threads (default: torch's own choice)")
    parser.add_argument("--minutes", type=float, help="start no setting after so many minutes")
    parser.add_argument("--commit", help="the commit to record where this is not a checkout")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a record")
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["expect"]:
        from bench import expect

        expect.main(words[1:])
        return 0
    chosen = parser.parse_args(words)
    return _run(chosen) if chosen.action == "run" else _read(chosen)


def _run(chosen: argparse.Namespace) -> int:
    suite = SUITES[chosen.suite]
    if (chosen.device or suite.device) == "cuda" and not torch.cuda.is_available():
        print(
            f"The suite {chosen.suite!r} measures a CUDA device and torch {torch.__version__} sees none here. "
            f"Nothing was measured. On this machine: python -m bench --suite cpu",
            file=sys.stderr,
        )
        return NO_DEVICE
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    path = runner.run_suite(
        chosen.suite,
        suite,
        chosen.out,
        device=chosen.device,
        fresh=chosen.fresh,
        minutes=chosen.minutes,
        measured_commit=chosen.commit,
    )
    print(summary.table(path))
    print(f"records: {path}")
    if chosen.out == runner.RESULTS:
        tables.pack(runner.RESULTS)
    failed = runner.wrong(path)
    for row in failed:
        print(f"without a time: {row['contender']}, {row['note']}", file=sys.stderr)
    return 1 if failed else 0


def _read(chosen: argparse.Namespace) -> int:
    paths = sorted(chosen.out.glob("*/*.csv"))
    if not paths:
        print(f"no records under {chosen.out}; run: python -m bench --suite {chosen.suite}", file=sys.stderr)
        return 1
    if chosen.action == "ship":
        print(f"{tables.pack(chosen.out)} rows of {len(paths)} records in the table of chapter 13")
        return 0
    for path in paths:
        print(f"{path.parent.name}, {path.stem}\n{summary.table(path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
