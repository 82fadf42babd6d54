"""What `quanttune.auto` chooses for a demo's model on validation rows, and its worth on test rows.

python -m benchmarks.accuracy.auto minilm --seeds 5 --out benchmarks/results/xeon-2-cores
python -m benchmarks.accuracy.auto digits --only onnx-npu --to-the-end --out DIR

A seed draws which of the held-out rows are for the choice and which for the test: for seed 0 those
of the demo. Of digits it also trains the model anew, and of smollm2 it draws the calibration rows.
The search ends when a drop of 1% is met, with --to-the-end when nothing improves; after --minutes
in any case. No tensor is left in float. A run that was interrupted goes on where it stopped.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import arguments
from benchmarks.provenance import commit
from quanttune.choosing.auto import Choice, auto
from quanttune.choosing.recipe import Recipe
from quanttune.choosing.search import Trial
from quanttune.choosing.space import Space
from quanttune.choosing.targets import TARGETS
from quanttune.demo import recipe
from quanttune.demo.smollm2 import judged
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.report.results_table import LESS_IS_BETTER

DROP = "1%"
REFIT_ROWS = 640  # of minilm; smollm2's are its demo's
TOLD = {"onnx-cpu": "sums in float, zero points", "onnx-npu": "everything, symmetric"}


@dataclass(frozen=True)
class Job:
    """A float model, batches to learn from, and held-out rows with what measures some of them."""

    metric: str
    model: nn.Module
    calibration: list[Any]
    refit: list[Any]
    validation: int  # how many of the held-out rows
    held_out: int
    measure: Callable[[nn.Module, Tensor], float]  # on the rows of these numbers

    def split(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return the numbers of the validation rows and of the test rows."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.held_out, generator=generator)
        if not seed:
            order = torch.arange(self.held_out)
        return order[: self.validation], order[self.validation :]


def digits(seed: int) -> Job:
    job = recipe("digits")(seed)
    images, labels = (torch.cat([x["validation"], x["test"]]) for x in (job.images, job.labels))

    def accuracy(model: nn.Module, rows: Tensor) -> float:
        return 100 * (model(images[rows]).argmax(1) == labels[rows]).float().mean().item()

    learning, few = list(job.images["tuning"].split(32)), len(job.images["validation"])
    return Job(job.metric, _base(job), job.calibration(), learning, few, len(images), accuracy)


def minilm(seed: int) -> Job:
    job = recipe("minilm")(0)
    model, ids = _base(job), torch.cat([job.rows.validation, job.rows.test])

    with torch.no_grad():
        exact = job.embed(model, ids)

    @torch.no_grad()
    def cosine(model: nn.Module, rows: Tensor) -> float:
        return F.cosine_similarity(job.embed(model, ids[rows]), exact[rows]).mean().item()

    learning = [{"input_ids": part} for part in job.rows.tuning[:REFIT_ROWS].split(16)]
    few = len(job.rows.validation)
    return Job(job.metric, model, job.calibration(), learning, few, len(ids), cosine)


def smollm2(seed: int) -> Job:
    job = recipe("smollm2")(seed)
    ids = torch.cat([job.rows.validation, job.rows.test])

    def perplexity(model: nn.Module, rows: Tensor) -> float:
        losses = [loss for loss, _ in judged(model, ids[rows])]
        return torch.cat(losses).double().mean().exp().item()

    learning = [{"input_ids": part} for part in job.rows.tuning[: job.refit_rows].split(4)]
    few = len(job.rows.validation)
    return Job(job.metric, _base(job), job.calibration(), learning, few, len(ids), perplexity)


JOBS = {"digits": digits, "minilm": minilm, "smollm2": smollm2}


def main() -> None:
    parser = arguments.of_task(__doc__, JOBS)
    parser.add_argument("--only", action="append", choices=TOLD, help="a target; repeat it")
    parser.add_argument("--to-the-end", action="store_true", help="do not stop at the drop")
    parser.add_argument("--minutes", type=float, default=20.0, help="for each search")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    path = options.out / f"auto-{options.task}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    results |= {"task": options.task, "drop": DROP, "environment": environment()}
    for seed in range(options.first, options.seeds):
        for name in options.only or TOLD:
            facts = {"seed": seed, "target": name, "to_the_end": options.to_the_end}
            if any(facts.items() <= row.items() for row in results["rows"]):
                continue
            row = (
                facts
                | {"commit": commit()}
                | _row(JOBS[options.task](seed), options.minutes, **facts)
            )
            results |= {"metric": row.pop("metric")}
            results["rows"].append(row)
            write_json(path, results)
            print({name: value for name, value in row.items() if name != "tried"}, flush=True)


def _row(job: Job, minutes: float, seed: int, target: str, to_the_end: bool) -> dict[str, Any]:
    validation, test = job.split(seed)
    less = job.metric in LESS_IS_BETTER
    began = time.monotonic()

    def tell(trial: Trial, best: Recipe | None) -> None:
        seconds = time.monotonic() - began
        print(f"{seconds:6.0f} s  {best or trial.point}  {trial.values[:3]}", flush=True)

    chosen = auto(
        job.model,
        target=replace(TARGETS[target], spares=False),
        data=job.calibration,
        refit_data=job.refit,
        evaluate=lambda model, part: job.measure(model, validation[part.start : part.stop]),
        rows=len(validation),
        drop=None if to_the_end else DROP,
        less_is_better=less,
        minutes=minutes,
        tell=tell,
    )
    seconds = time.monotonic() - began
    values = {
        "validation": job.measure(chosen.model, validation),
        "test": job.measure(chosen.model, test),
        "float_validation": job.measure(job.model, validation),
        "float_test": job.measure(job.model, test),
    }
    return {"metric": job.metric, **values, "seconds": round(seconds, 1), **_facts(chosen, target)}


def _facts(chosen: Choice, target: str) -> dict[str, Any]:
    prefix = next((r.prefix for r, _ in chosen.tried if r.prefix), ())
    axes = Space(TARGETS[target], prefix).axes
    return {
        "recipe": chosen.recipe.as_dict(),
        "ended": chosen.ended,
        "met": chosen.met,
        "points": prod(len(values) for values in axes.values()),
        "steps": [{"recipe": str(step.recipe), "value": step.value} for step in chosen.steps],
        "tried": [
            {
                "recipe": str(recipe),
                "values": trial.values,
                "seconds": round(trial.seconds, 1),
                "refused": trial.refused,
            }
            for recipe, trial in chosen.tried
        ],
    }


def _base(job: Any) -> nn.Module:
    """Return the model that nobody has tuned."""
    model: nn.Module = job.prepare(next(a for a in job.arms if a.name == "base"), lambda: None)
    return model.eval()


if __name__ == "__main__":
    main()
