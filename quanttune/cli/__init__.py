"""The command line: each verb is a file with a short function that calls the library.

A verb imports what it needs when it runs, so that --help is there at once.
"""

import sys

import typer
from safetensors import SafetensorError

from . import (
    analyze,
    auto,
    bench,
    calibrate,
    demo,
    doctor,
    evaluate,
    export,
    refit,
    report,
    reproduce,
    requantize,
    tune,
    verify,
)
from .language import learn
from .terminal import quiet, say, written

_WRITER = "inline_container.cc"  # in what torch.save says of a full disk: a RuntimeError like any

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def about() -> None:
    """Make Transformers ready for plain integer quantization."""


app.command("demo")(demo.run)
app.command("refit")(refit.run)
app.command("tune")(tune.run)
app.command("calibrate")(calibrate.run)
app.command("evaluate")(evaluate.run)
app.command("requantize")(requantize.run)
app.command("export")(export.run)
app.command("verify")(verify.run)
app.command("bench")(bench.run)
app.command("auto")(auto.run)
app.command("analyze")(analyze.run)
app.command("reproduce")(reproduce.run)
app.command("report")(report.run)
app.command("doctor")(doctor.run)
learn(app)


def main() -> None:
    """Run the command line; bad arguments and interruptions end in one line, not in a traceback."""
    written.clear()
    try:
        with quiet():
            app()
    except KeyboardInterrupt:
        left = f"{written[-1]} may not be whole" if written else "nothing was written"
        say(f"interrupted: {left}", "red")
        sys.exit(130)
    except (ValueError, ImportError, OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _WRITER not in str(error):
            raise
        say(f"error: {error}", "red")
        sys.exit(2)
