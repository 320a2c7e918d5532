"""`python -m bench --suite smoke|headline|cpu|large` measures; `... show` and `... plot` read the records."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench import plots, runner
from bench.suites import SUITES


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("action", nargs="?", default="run", choices=("run", "show", "plot"))
    parser.add_argument("--suite", default="smoke", choices=tuple(SUITES))
    parser.add_argument("--out", type=Path, default=runner.RESULTS, help="folder of the records (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch's CPU threads (default: torch's own choice)")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a record")
    chosen = parser.parse_args(arguments)
    if chosen.action == "run":
        if chosen.threads is not None:
            torch.set_num_threads(chosen.threads)
        path = runner.run_suite(chosen.suite, SUITES[chosen.suite](), chosen.out, chosen.fresh)
        print(plots.table(path))
        print(f"records: {path}")
        return 0
    paths = sorted(chosen.out.glob("*/*.csv"))
    if not paths:
        print(f"no records under {chosen.out}; run: python -m bench --suite {chosen.suite}", file=sys.stderr)
        return 1
    for path in paths:
        print(f"{path.parent.name}, {path.stem}\n{plots.table(path)}" if chosen.action == "show" else plots.draw(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
