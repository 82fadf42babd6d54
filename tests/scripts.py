"""Scripts that need a Python of their own."""

import subprocess
import sys


def run(script, folder):
    """Run a script in a process of its own, whose working directory holds no quanttune."""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
