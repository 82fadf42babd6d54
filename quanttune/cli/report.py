"""`quanttune report`."""

from pathlib import Path
from typing import Annotated

import typer

from .terminal import say, writable


def run(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="results.json of demos and tables, analysis.json of analyses, auto.json."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The page.", callback=writable)] = Path("report.html"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check all; stop.")] = False,
) -> None:
    """Put results files on one page, with their figures and tables.

    Example: quanttune report demo/results.json analysis/analysis.json --out report.html
    """
    from ..files import write_text
    from ..report.report import build, read

    page = build(read(results))
    if dry_run:
        say(f"{len(results)} file(s) make a page of {len(page) // 1000} kB; it goes to {out}")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)
    say(f"Written: {out}")
