"""`quanttune tune`."""

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..jobs.settings import Settings
from ..losses import LOSSES
from ..tuning import schedule
from ..tuning.attach import BALANCES
from ..tuning.finishing import BITS
from . import options
from .stopping import stopping
from .terminal import (
    Json,
    is_first_process,
    of_first_process,
    progress_bar,
    say,
    write_numbers,
)

Patterns = Annotated[list[str] | None, typer.Option(help="Names of modules, such as '*.mlp.*'.")]
Fields = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Any other field of transformers' TrainingArguments."),
]

RECIPE_ROWS, RECIPE_FINISH = 640, 3 / 8  # rows that it refits to, and the share of rounded steps


def _tuning(
    alpha: Annotated[float, typer.Option(help="Weight of the outlier loss, 0 to 1.")] = 0.5,
    decay: Annotated[str, typer.Option(help="Of alpha: linear, cosine or constant.")] = "linear",
    balance: Annotated[str, typer.Option(help="none, or initial.")] = "none",
    detach_deviation: Annotated[
        bool, typer.Option("--detach-deviation", help="Hold std(A) constant in the gradient.")
    ] = False,
    loss: Annotated[
        str, typer.Option(help=f"What an outlier costs: {', '.join(LOSSES)}.")
    ] = "ratio",
    observe_every: Annotated[
        int, typer.Option(help="Observe at every k-th step only, for k times the weight.")
    ] = 1,
    include: Patterns = None,
    exclude: Patterns = None,
    finish_steps: Annotated[
        int, typer.Option(min=0, help="The last steps, which round while they train.")
    ] = 0,
    finish_bits: Annotated[
        list[int] | None,
        typer.Option(
            help="A width of theirs; repeat for several.", show_default=", ".join(map(str, BITS))
        ),
    ] = None,
) -> dict[str, Any]:
    """Check the arguments of `quanttune.attach`, and return them."""
    options.one_of("--balance", balance, BALANCES)
    options.one_of("--loss", loss, LOSSES)
    return {
        "alpha": alpha, "decay": decay, "balance": balance, "detach_deviation": detach_deviation,
        "loss": loss, "observe_every": observe_every, "include": include or ["*"],
        "exclude": exclude or [], "finish_steps": finish_steps,
        "finish_bits": finish_bits or [*BITS],
    }  # fmt: skip


def _training(
    lora_rank: Annotated[
        int, typer.Option(min=0, help="Train adapters of this rank (peft), and merge them.")
    ] = 0,
    activation_checkpointing: Annotated[
        bool,
        typer.Option(
            "--activation-checkpointing",
            "--gradient-checkpointing",
            help="Keep the input of each block only, and compute the rest again in backward.",
        ),
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Multiply in bfloat16; the weights stay float32.")
    ] = False,
    trainer: Fields = None,
) -> dict[str, Any]:
    """Return what of the settings says how the Trainer trains."""
    if lora_rank:
        with options.of_extra("lora"):
            import peft as peft
    fields = _fields(trainer or [])
    if activation_checkpointing:
        fields["activation_checkpointing"] = "true"
    if bf16:
        fields["bf16"] = "true"
    return {"lora_rank": lora_rank, "trainer": fields}


@options.grouped(settings=options.dataset, tuning=_tuning, training=_training)
def run(
    settings: Settings,
    tuning: dict[str, Any],
    training: dict[str, Any],
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="Its largest value.")] = 2e-5,
    save_steps: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    refit_rows: Annotated[
        int, typer.Option(min=0, help="Rows that the model is refitted to before the first step.")
    ] = 0,
    recipe: Annotated[
        bool,
        typer.Option(
            "--recipe",
            help="Refit, hold std(A) constant, and finish rounded: --refit-rows 640 "
            "--detach-deviation --finish-steps of three eighths of --steps.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load and check all; stop.")] = False,
    json: Json = None,
) -> None:
    """Tune a model on your data, in a folder from which a killed run goes on with --resume.

    Example: quanttune tune google-bert/bert-base-uncased --task text-classification
    --data nyu-mll/glue --subset sst2 --steps 2000 --trainer warmup_steps=100 --out sst2
    """
    if recipe:
        refit_rows = refit_rows or RECIPE_ROWS
        finish_steps = tuning["finish_steps"] or int(RECIPE_FINISH * steps)
        tuning |= {"detach_deviation": True, "finish_steps": finish_steps}
    settings = replace(
        settings, steps=steps, refit_rows=refit_rows, learning_rate=learning_rate,
        save_steps=save_steps, tuning=tuning, **training,
    )  # fmt: skip
    schedule.check(tuning["alpha"], tuning["decay"], steps)
    from ..jobs.tune import tune

    try:
        with of_first_process(), progress_bar() as bar, stopping() as stop:
            task_id = bar.add_task("loading", total=steps)

            def advance(step: int, loss: float) -> None:
                bar.update(task_id, completed=step, description=f"loss {loss:.4g}")
                stop()

            outcome = tune(settings, out, resume=resume, dry_run=dry_run, say=say, progress=advance)
    except KeyboardInterrupt:
        _say_how_to_go_on(out, resume)
        raise typer.Exit(130) from None
    if not is_first_process():
        return
    if not dry_run:
        say(f"the model is in {outcome['model']}")
    write_numbers(json, outcome)


def _say_how_to_go_on(out: Path, resume: bool) -> None:
    if not (out / "config.json").exists():
        say("interrupted: nothing was written")
        return
    again = ["quanttune", *sys.argv[1:], *([] if resume else ["--resume"])]
    newest = any(out.glob("checkpoint-*/complete.json"))
    place = "the newest checkpoint" if newest else "the start"
    say(f"interrupted. To go on from {place}: {shlex.join(again)}")


def _fields(texts: list[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise ValueError(f"--trainer takes KEY=VALUE, such as weight_decay=0.01, got {text!r}")
    return dict(text.split("=", 1) for text in texts)
