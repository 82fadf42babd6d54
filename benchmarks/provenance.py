"""Which commit a result was measured on."""

import os
import subprocess
from pathlib import Path


def commit() -> str | None:
    """Return the commit of the checkout, with "-dirty" behind it if files have changed since.

    A copy without .git is told by the environment variable QUANTTUNE_COMMIT.
    """
    if "QUANTTUNE_COMMIT" in os.environ:
        return os.environ["QUANTTUNE_COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    root = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return None
    return done.stdout.strip() or None
