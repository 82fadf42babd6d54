"""`quanttune tune`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .terminal import Json, progress_bar, say, write_numbers

Patterns = Annotated[list[str] | None, typer.Option(help="Names of modules, such as '*.mlp.*'.")]
Fields = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Any other field of transformers' TrainingArguments."),
]


def run(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    task: options.Task = None,
    subset: options.Subset = None,
    split: options.Split = "train",
    text: options.Columns = None,
    label: options.Label = None,
    tokens: options.Tokens = 128,
    alpha: Annotated[float, typer.Option(help="Weight of the outlier loss, 0 to 1.")] = 0.5,
    decay: Annotated[str, typer.Option(help="Of alpha: linear, cosine or constant.")] = "linear",
    balance: Annotated[str, typer.Option(help="none, or initial.")] = "none",
    detach_deviation: Annotated[
        bool, typer.Option("--detach-deviation", help="Hold std(A) constant in the gradient.")
    ] = False,
    include: Patterns = None,
    exclude: Patterns = None,
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 1000,
    batch_size: options.BatchSize = 32,
    learning_rate: Annotated[float, typer.Option(help="Its largest value.")] = 2e-5,
    save_steps: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
    trainer: Fields = None,
    seed: options.Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load and check all; stop.")] = False,
    json: Json = None,
) -> None:
    """Tune a model on your data, in a folder from which a killed run goes on with --resume.

    Example: quanttune tune google-bert/bert-base-uncased --task text-classification
    --data nyu-mll/glue --subset sst2 --steps 2000 --trainer warmup_steps=100 --out sst2
    """
    tuning: dict[str, Any] = {
        "alpha": alpha,
        "decay": decay,
        "balance": balance,
        "detach_deviation": detach_deviation,
        "include": include or ["*"],
        "exclude": exclude or [],
    }
    settings = options.settings_of(
        model=model, data=data, task=task, subset=subset, split=split, text=text, label=label,
        tokens=tokens, steps=steps, batch_size=batch_size, learning_rate=learning_rate,
        save_steps=save_steps, seed=seed, tuning=tuning, trainer=_fields(trainer or []),
    )  # fmt: skip
    from ..runs.tuning import tune

    bar = progress_bar()
    task_id = bar.add_task("tuning", total=steps)

    def advance(step: int, loss: float) -> None:
        bar.start()
        bar.update(task_id, completed=step, description=f"loss {loss:.4g}")

    try:
        outcome = tune(settings, out, resume=resume, dry_run=dry_run, say=say, progress=advance)
    except KeyboardInterrupt:
        bar.stop()
        again = ["quanttune", *sys.argv[1:], *([] if resume else ["--resume"])]
        say(f"interrupted. To go on from the newest checkpoint: {shlex.join(again)}")
        raise typer.Exit(130) from None
    finally:
        bar.stop()
    if not dry_run:
        say(f"the model is in {outcome['model']}")
    write_numbers(json, outcome)


def _fields(texts: list[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise ValueError(f"--trainer takes KEY=VALUE, such as weight_decay=0.01, got {text!r}")
    return dict(text.split("=", 1) for text in texts)
