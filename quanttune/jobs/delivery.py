"""What `quanttune auto` ends with: the model, its file for a target, test rows, the page."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.sensitivity import relative_error
from ..choosing.judge import allowed_drop
from ..choosing.targets import Target, target_of
from ..deploy.external_data import size_of
from ..deploy.onnx_model import OnnxModel
from ..deploy.torch_export import export_torch
from ..deploy.verification.verify import verify
from ..environment import environment
from ..quantization.running import evaluating, main_output
from ..report.report import write_report
from .auto_rows import Request, Rows, evaluation, first_rows
from .dataset import Dataset
from .export import dimensions, example, export, load_calibrated
from .metrics import METRICS, measure
from .run_folder import RunFolder
from .settings import Settings
from .verify import answering, completed

NUMBERS = "auto.json"
PROGRAM_ERROR = 0.5  # of a program, beside what rounding itself moved


def finish(
    settings: Settings,
    request: Request,
    parts: Rows,
    folder: RunFolder,
    models: Mapping[str, nn.Module],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Publish a model and its file, measure both on the test rows, and write numbers and a page.

    models: "float" and "quantized". facts: how the search went, to be told beside.
    """
    metric, values = METRICS[request.metric], dict[str, dict[str, float]]()
    for name, model in models.items():
        for part in ("validation", "test"):
            data = getattr(parts, part)
            evaluate = evaluation(settings, data, request.metric)
            values.setdefault(part, {})[name] = evaluate(model, range(len(data.rows)))
    folder.publish(models["quantized"].cpu(), parts.learning.processor, settings.steps)
    target = target_of(request.target)
    source = replace(settings, model=str(folder.model))
    delivered: dict[str, Any] = {"file": NAMES[target.format], "bytes": None, "value": None}
    try:
        path = folder.path / delivered["file"]
        delivered |= FORMATS[target.format](source, target, path, parts.test, request.metric)
    except ValueError as error:  # the model is there, whatever its file is
        delivered["problems"] = [str(error)]
    if delivered["value"] is not None:
        values["test"]["file"] = delivered["value"]
    numbers = {
        "auto": Path(settings.model).name,
        "target": request.target,
        "metric": request.metric,
        "drop": request.drop,
        "less_is_better": metric.less_is_better,
        "values": values,
        "verdict": verdict(values, request),
        "file": delivered,
        "float_bytes": sum(4 * p.numel() for p in models["float"].parameters()),
        **facts,
        **parts.facts,
        "environment": environment(),
    }
    write_report(numbers, folder.path, NUMBERS)
    return numbers


def verdict(values: Mapping[str, Mapping[str, float]], request: Request) -> dict[str, Any]:
    """Say whether the drop is met, on the validation rows and on the test rows, and by how much."""
    sign = -1 if METRICS[request.metric].less_is_better else 1
    lost = {part: sign * (of["float"] - of["quantized"]) for part, of in values.items()}
    allowed = {part: allowed_drop(request.drop, of["float"]) for part, of in values.items()}
    met = {part: lost[part] <= allowed[part] for part in values}
    words = [
        f"{request.metric} of the {part} rows: {of['quantized']:.6g}, of the float model "
        f"{of['float']:.6g}: {lost[part]:.3g} lost, {allowed[part]:.3g} allowed"
        for part, of in values.items()
    ]
    gap = lost["test"] - lost["validation"]
    return {"met": all(met.values()), "of": met, "lost": lost, "gap": gap, "words": words}


def _onnx(
    settings: Settings, target: Target, path: Path, data: Dataset, metric: str
) -> dict[str, Any]:
    export(settings, path, **target.export)
    _, model = load_calibrated(settings)
    taken = OnnxModel(path).inputs

    def batches(some: Dataset) -> Iterator[dict[str, Tensor]]:
        return (completed(batch, taken) for batch in some.batches(settings, model))

    first = next(batches(first_rows(data, settings.batch_size)))
    del first["labels"]
    found = verify(path, model, [first])
    with answering(path, model) as file:
        value = measure((metric,), file, batches(data), data.processor)
    return {
        "bytes": size_of(path),
        "value": value[metric],
        "problems": list(found.problems),
    }


def _program(
    settings: Settings, target: Target, path: Path, data: Dataset, metric: str
) -> dict[str, Any]:
    source, model = load_calibrated(settings)
    inputs = example(source)
    dynamic = dimensions(source) if target.export["target"] == "inductor" else None
    program = export_torch(model, inputs, dynamic=dynamic, **target.export)
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    with torch.no_grad(), evaluating(model):
        exact = main_output(source.load(settings.seed, quantized=False).cpu()(**inputs))
        rounded, found = (main_output(one(**inputs)) for one in (model, loaded))
    moved, off = relative_error([rounded], [exact]), relative_error([found], [rounded])
    problems = (
        []
        if off <= PROGRAM_ERROR * moved
        else [
            f"the program's answers are {off:.3g} of their norm away from the simulation's, which "
            f"rounding itself moved by {moved:.3g}"
        ]
    )
    return {"bytes": path.stat().st_size, "problems": problems}


# an ONNX file is verified layer by layer on the first batch, and measured on the test rows; a
# program of PyTorch is loaded, and its answers are compared on two rows that are made up
FORMATS: Mapping[str, Callable[..., dict[str, Any]]] = {"onnx": _onnx, "torch": _program}
NAMES = {"onnx": "model.onnx", "torch": "model.pt2"}
