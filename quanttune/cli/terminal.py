"""What the verbs share: the console, a progress bar, and --json."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console()

Json = Annotated[Path | None, typer.Option(help="Write the numbers to this file as well.")]


def say(line: str) -> None:
    """Print a line as it is: no colors, and no breaks in a path."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def progress_bar() -> Progress:
    """Return a progress bar with the time that is left; it is shown while it is entered."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def showing() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar, and yield what moves it: called with what is done, how far, and of how much."""
    with progress_bar() as bar:
        task = bar.add_task("loading", total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield advance


def write_numbers(path: Path | None, data: Any) -> None:
    """Write what --json asked for, if it asked."""
    from ..files import write_json

    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, data)
