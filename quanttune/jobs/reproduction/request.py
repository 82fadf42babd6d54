"""What is asked for, and what the cells of a model and a task are measured with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...quantization.scheme import Scheme
from ...tuning import schedule
from ..models import find_model, resolve
from ..settings import Settings
from .arms import Budget
from .cells import Bench
from .inputs import BATCHES, load_inputs, measured_split
from .random_weights import write_random
from .tables import ALPHAS, BITS, TABLES, Model, Table, Task
from .ways import Way, ways_of

TRIAL_SHARE = 8  # of the rows of a trial one in so many is calibrated with


@dataclass(frozen=True)
class Request:
    """What every cell of a run shares. None takes what is the table's.

    Args:
        table: a name in TABLES, or "figures".
        data: a folder, a file or the name of a dataset; training_data: other rows to learn from.
        limit: a trial, of no more rows than so many of any part; an eighth of them calibrate, and
            searches are cut short.
        calibration: rows that ranges are taken from, in ten batches.
        random_weights: draw models of the table's shapes, in place of pretrained ones.
    """

    table: str
    data: str
    training_data: str = ""
    limit: int | None = None
    calibration: int | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    tokens: int | None = None
    random_weights: bool = False


@dataclass(frozen=True)
class Selection:
    """Which cells of a table are measured; what is empty takes all of the table's.

    Args:
        checkpoints: other weights for a model of the table.
        workers: processes that read images beside this one.
    """

    models: Sequence[str] = ()
    tasks: Sequence[str] = ()
    methods: Sequence[str] = ()
    bits: Sequence[int] = BITS
    alphas: Sequence[float] = ()
    seeds: int = 1
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    workers: int = 0

    def __post_init__(self) -> None:
        for bits in self.bits:
            Scheme(bits)  # checks it
        for alpha in self.alphas:
            schedule.check(alpha, "constant", None)

    def models_of(self, table: Table) -> list[Model]:
        _check("--checkpoint", self.checkpoints, table.models)
        return [table.models[name] for name in _chosen("--models", self.models, table.models)]

    def tasks_of(self, table: Table) -> list[Task]:
        return [table.tasks[name] for name in _chosen("--tasks", self.tasks, table.tasks)]

    def ways_of(self, table: Table) -> list[Way]:
        return ways_of(_chosen("--methods", self.methods, table.ways), self.alphas or ALPHAS)


def bench_of(
    request: Request,
    selection: Selection,
    table: Table,
    model: Model,
    task: Task,
    out: Path,
    say: Callable[[str], None],
) -> Bench:
    """Return what the cells of a model and a task are measured with; its rows are read.

    Raises:
        ValueError: there are no weights, or the data do not fit; it says what would.
    """
    told: dict[str, Any] = {"data": request.data, "task": table.kind, "text": table.text}
    told["tokens"] = request.tokens or table.tokens
    told["batch_size"] = request.batch_size or table.batch_size
    origin = selection.checkpoints.get(model.name, model.origin)
    settings = Settings(model=origin, **told)
    if request.random_weights and model.name not in selection.checkpoints:
        folder = out / "random" / (model.name + (f"-{task.subset}" if task.subset else ""))
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_random(measured_split(settings, task), folder)
        settings = replace(settings, model=str(folder))
    elif model.name not in selection.checkpoints:
        _check_weights(settings, model)
    inputs = load_inputs(settings, task, request.training_data, request.limit, selection.workers)
    for line in inputs.said:
        say(line)
    budget = Budget(
        request.epochs or table.epochs,
        request.learning_rate or table.learning_rate,
        request.batch_size or table.batch_size,
        request.steps,
    )
    calibration = request.calibration or table.calibration
    if request.limit:
        calibration = min(calibration, max(BATCHES, request.limit // TRIAL_SHARE))
    folder = out / "models" / model.name / (task.subset or task.name)
    return Bench(settings, inputs, budget, calibration, request.limit is not None, folder)


def table_with(models: Sequence[str]) -> Table:
    """Return the table that has some models, for the figures.

    Raises:
        ValueError: none has them all.
    """
    for table in TABLES.values():
        if {*models} <= {*table.models}:
            return table
    known = [name for table in TABLES.values() for name in table.models]
    _check("--models", models, known)
    raise ValueError(f"--models must be of one table for one --data, got {', '.join(models)}")


def _chosen(
    option: str, names: Sequence[str], known: Sequence[str] | Mapping[str, Any]
) -> list[str]:
    """Return those of the known names that were asked for, in their order; or all."""
    _check(option, names, known)
    return [name for name in known if not names or name in names]


def _check(option: str, names: Any, known: Any) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{option} must be of {', '.join(known)}, got {name!r}")


def _check_weights(settings: Settings, model: Model) -> None:
    try:
        find_model(settings)
    except ValueError as error:
        origin = resolve(settings.model)
        raise ValueError(
            f"the weights of {model.label} ({origin}) are not on this machine, and cannot be had "
            f"from the Hugging Face Hub. Where there is internet, `hf download {origin} "
            f"--local-dir {model.name}`; bring the folder here and give --checkpoint "
            f"{model.name}={model.name}. Or try the command with --random-weights"
        ) from error
