"""What the verbs share: the console, a progress bar, and --json."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..files import check_writable
from ..progress import Progress
from .language import in_options

console = Console()
_PACKAGE = Path(__file__).parent.parent


def writable(path: Path | None) -> Path | None:
    """Check what an option says is to be written."""
    if path:
        check_writable(path)
    return path


Json = Annotated[
    Path | None, typer.Option(help="Write the numbers to this file as well.", callback=writable)
]


written: list[Path] = []  # what a verb has begun to write in several steps


def say(line: str, style: str = "") -> None:
    """Print a line in the language of options: no colors of rich's, and no breaks in a path."""
    console.print(in_options(line), style=style, highlight=False, markup=False, soft_wrap=True)


def is_first_process() -> bool:
    """Tell whether this is the one of a launcher's processes that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def of_first_process() -> Iterator[None]:
    """Say nothing in the others, but for what ends them."""
    before, console.quiet = console.quiet, not is_first_process()
    try:
        yield
    finally:
        console.quiet = before


@contextmanager
def quiet() -> Iterator[None]:
    """Keep other libraries' bars, warnings and logs off the terminal; say our own warnings.

    Their logs are left out up to warnings. Bars of downloads stay where somebody sees them.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        if not sys.warnoptions:  # python -W says otherwise
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _say_warning
        try:
            yield
        finally:
            logging.disable(before)


def _say_warning(
    message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any
) -> None:
    if Path(filename).is_relative_to(_PACKAGE):
        say(f"warning: {message}", "yellow")


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """Show a progress bar with the time that is left.

    At the end it is full. If an error ends it, or nothing has come of it, none is left standing.
    """
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        yield bar
        for task in bar.tasks:
            if task.total and task.completed:
                bar.update(task.id, completed=task.total)
                bar.live.transient = False


@contextmanager
def showing() -> Iterator[Progress]:
    """Show a bar, and yield what moves it."""
    with progress_bar() as bar:
        task = bar.add_task("loading", total=None)

        def advance(what: str, done: int, total: int | None) -> None:
            if bar.tasks[0].description != what:
                bar.reset(task)  # its time is its own
            bar.update(task, description=what, completed=done, total=total)

        yield advance


def write_numbers(path: Path | None, data: Any) -> None:
    """Write what --json asked for, if it asked."""
    from ..files import write_json

    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, data)
