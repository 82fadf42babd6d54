"""What the verbs share: the console, a progress bar, and --json."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from ..progress import Progress

console = Console()

Json = Annotated[Path | None, typer.Option(help="Write the numbers to this file as well.")]


def say(line: str) -> None:
    """Print a line as it is: no colors, and no breaks in a path."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def progress_bar() -> Bar:
    """Return a progress bar with the time that is left; it is shown while it is entered."""
    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
    )


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
