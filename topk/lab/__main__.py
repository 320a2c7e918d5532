"""`python -m topk.lab COMMAND`, the commands being those of `ROOMS`. Each command lives in its own room."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# A room offers `add_arguments(subparsers)`: it adds its command and sets `run`, a function of the parsed arguments that
# returns the exit status (None is 0). Only the room that is asked for is imported.
ROOMS = {
    "data": ("topk.lab.data", "fill, list, import and export the packed cache"),
    "features": ("topk.lab.features", "extract frozen features with a pretrained network"),
    "components": ("topk.lab.components", "principal components of features"),
    "sweep": ("topk.lab.sweeps", "run what a sweep file asks for and has no record yet"),
    "choose": ("topk.lab.tuning", "from a tuning sweep's records, the sweep of the runs that count"),
    "reproduce": ("topk.lab.reproduce", "run a record's configuration again and compare"),
    "ship": ("topk.lab.shipped", "pack records and a sample of real data for the wheel"),
    "records": ("topk.lab.records", "check, show and merge records of runs"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; mistakes in what it was given end in one line, not a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m topk.lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (room, text) in ROOMS.items():
        if given[:1] == [name]:
            importlib.import_module(room).add_arguments(commands)
        else:
            commands.add_parser(name, help=text, add_help=False)
    chosen = parser.parse_args(given)
    try:
        return int(chosen.run(chosen) or 0)
    except (ValueError, TypeError, OSError) as error:
        print(f"{parser.prog} {chosen.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
