"""Ctrl-C between steps, not in the middle of one."""

import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from .terminal import say

STEP = "this step is the last"


@contextmanager
def stopping(said: str = STEP) -> Iterator[Callable[[], None]]:
    """Let the first Ctrl-C end a step before it ends the run; yield what ends it between steps.

    In the middle of one it may hit a place whose exceptions Python only prints, such as a weak
    reference's callback. The second acts at once, as does one before the first step. `said` is said
    of the first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.getsignal(signal.SIGINT)
    asked = stepping = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)
        say(f"{said}; Ctrl-C again stops at once")

    def stop() -> None:
        nonlocal stepping
        if asked:
            raise KeyboardInterrupt
        if not stepping:
            signal.signal(signal.SIGINT, ask)
        stepping = True

    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def say_how_to_go_on(out: Path, resume: bool) -> None:
    """Say with which command an interrupted run in a folder goes on."""
    if not (out / "config.json").exists():
        say("interrupted: nothing was written")
        return
    again = ["quanttune", *sys.argv[1:], *([] if resume else ["--resume"])]
    say(f"interrupted. To go on: {shlex.join(again)}")
