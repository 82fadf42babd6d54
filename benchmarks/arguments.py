"""What the scripts that leave a file of results have in common on their command lines."""

import argparse
from collections.abc import Collection
from pathlib import Path

from quanttune.demo import NAMES


def of_task(summary: str, tasks: Collection[str] = NAMES) -> argparse.ArgumentParser:
    """Return a parser that knows a demo's task, how many seeds, and the folder of results."""
    parser = of_folder(summary)
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--seeds", type=int, default=3)
    return parser


def of_folder(summary: str) -> argparse.ArgumentParser:
    """Return a parser that knows the folder of results."""
    parser = argparse.ArgumentParser(description=summary.splitlines()[0])
    parser.add_argument("--out", type=_made, required=True, help="folder of the results")
    return parser


def _made(folder: str) -> Path:
    """Make a folder at once: after hours of measuring is too late to miss it."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    return path
