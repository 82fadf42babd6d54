"""What the scripts that repeat a demo's job have in common on their command lines."""

import argparse
from collections.abc import Collection
from pathlib import Path

from quanttune.demo import NAMES


def of_task(summary: str, tasks: Collection[str] = NAMES) -> argparse.ArgumentParser:
    """Return a parser that knows the task, how many seeds, and the folder of results."""
    parser = argparse.ArgumentParser(description=summary.splitlines()[0])
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    return parser
