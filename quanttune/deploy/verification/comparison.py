"""An ONNX file beside the simulation: its scales and tensors, its layers, and the whole of it."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from ...batches import arguments_of
from ...quantization.state import quantizers
from ..integer_weights import MAX_INTEGER_BITS
from ..onnx_model import OnnxModel
from ..past import has_past
from ..tracing import outputs_by_name
from .agreement import Distances, Layer, compare_codes
from .graph_cut import CODES, Rounding, cut, input_for, parsed, roundings, stored_tensors
from .identity import check_shapes, tensors_of
from .problems import wrong_grids, wrong_layers, wrong_output, wrong_tensors
from .result import Output
from .simulated_codes import perturbed, recording, shifted
from .steps import PRESENTS, compared


def compare(
    path: Path, file: onnx.ModelProto, model: nn.Module, data: Iterable[Any]
) -> dict[str, Any]:
    """Return the fields of a Verification; the model is in evaluation mode.

    Raises:
        ValueError: the file is of another model, or data is empty.
    """
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        raise ValueError("data is empty: verify needs at least one batch of inputs")
    stored = stored_tensors(file)
    sites = list(roundings(file, stored))
    kinds = {codes.dtype.name for name, codes in stored.items() if name.endswith(CODES)}
    wanted = tensors_of(model, "uint8" if "uint8" in kinds else "int8")
    check_shapes(wanted, stored, path)
    problems = [*wrong_grids(sites, model), *wrong_tensors(stored, wanted)]
    cut(file, sites)
    codes, simulated = _simulate(model, first, sites)
    threads = torch.get_num_threads()
    parts = OnnxModel(file, threads=threads)
    fed = {input_for(s.codes): shifted(codes[s.codes], s.center, s.dtype.name) for s in sites}
    found = _call(parts, first, model, fed)
    found |= {s.codes: shifted(found[s.codes], -s.center, "int8") for s in sites}
    for name, values in codes.items():
        _check_shape(name, found.get(name, values), values)
    layers = [compare_codes(*parsed(s.codes), found[s.codes], codes[s.codes]) for s in sites]
    merged, lost = _not_in_file(codes, sites, model)
    unused = lost if lost and _decide_nothing(lost, model, first, simulated, file) else []
    problems += [f"the file does not round at {name}" for name in lost if not unused]
    problems += wrong_layers(layers)
    others = ((batch, _call(model, batch, model)) for batch in batches)
    runs = chain([(first, simulated)], others)
    outputs = _outputs(OnnxModel(path, threads=threads), model, runs, found, layers)
    problems += chain.from_iterable(map(wrong_output, outputs))
    floats = [
        site for site, quantizer in quantizers(model).items() if quantizer.bits > MAX_INTEGER_BITS
    ]
    return {
        "layers": tuple(layers),
        "outputs": tuple(outputs),
        "merged": tuple(merged),
        "unused": tuple(unused),
        "floats": tuple(floats),
        "problems": tuple(problems),
    }


def _simulate(
    model: nn.Module, batch: Any, sites: Sequence[Rounding]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the codes of all calls of a simulated forward, and its outputs."""
    with recording(model) as codes:
        outputs = _call(model, batch, model)
    if strange := [site.codes for site in sites if site.codes not in codes]:
        raise ValueError(f"the file makes {strange[0]}, which the model does not of these data")
    return codes | {site.codes: _repeated(codes[site.codes], site.shape) for site in sites}, outputs


def _repeated(codes: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Repeat a group's keys or values for its query heads, if the file's were before they are
    rounded.

    A model may repeat them itself or leave it to the attention, as there is a mask or none. Those
    of transformers do, and their file was traced with one.
    """
    if codes.dim() != len(shape) or len(shape) < 3 or shape[-3] % codes.shape[-3]:
        return codes
    return codes.repeat_interleave(max(shape[-3] // codes.shape[-3], 1), -3)


def _call(
    called: nn.Module | OnnxModel, batch: Any, model: nn.Module, more: Mapping[str, Tensor] = {}
) -> Any:
    """Call a model, or a file of it, with what the model takes of a batch."""
    args, kwargs = arguments_of(batch, model)
    found = outputs_by_name(called(*args, **kwargs, **more))
    return compared(kwargs, found) if has_past(found) else found


def _check_shape(name: str, file: Tensor, simulation: Tensor) -> None:
    if file.shape != simulation.shape:
        raise ValueError(
            f"{name} is {list(file.shape)} in the file, {list(simulation.shape)} in the model"
        )


def _not_in_file(
    codes: Mapping[str, Tensor], sites: Sequence[Rounding], model: nn.Module
) -> tuple[list[str], list[str]]:
    """Return the calls that take their codes from another one of the file, and all others.

    The exporter merges what rounds the same tensor with the same grid.
    """
    grids = quantizers(model)

    def grid(name: str) -> tuple[float, int]:
        quantizer = grids[parsed(name)[0]]
        return quantizer.step.item(), quantizer.zero

    there = {site.codes for site in sites}
    merged, lost = [], []
    for name, values in codes.items():
        if name in there:
            continue
        same = (other for other in there if grid(other) == grid(name))
        if any(torch.equal(codes[other], values) for other in same):
            merged.append(name)
        else:
            lost.append(name)
    return merged, lost


def _decide_nothing(
    calls: Sequence[str],
    model: nn.Module,
    batch: Any,
    simulated: Mapping[str, Tensor],
    file: onnx.ModelProto,
) -> bool:
    """Tell whether a file's outputs stay the same when the codes of sites are others.

    The exporter leaves out what no output needs, such as a pooler in front of a decoder.
    """
    grids = quantizers(model)
    with ExitStack() as undo:
        for site in {parsed(name)[0] for name in calls}:
            hook = grids[site].register_forward_hook(lambda grid, _, output: output + grid.step)
            undo.callback(hook.remove)
        others = _call(model, batch, model)
    there = {value.name for value in file.graph.output}
    names = [name for name in simulated if name in there or name == PRESENTS]
    return all(torch.equal(others[name], simulated[name]) for name in names)


def _outputs(
    file: OnnxModel,
    model: nn.Module,
    runs: Iterable[tuple[Any, Mapping[str, Tensor]]],
    same_codes: Mapping[str, Tensor],
    layers: Sequence[Layer],
) -> list[Output]:
    """Compare the whole file, and a simulation whose codes flip as the file's, with that of each
    batch.
    """
    distances: dict[str, list[Distances]] = {}
    largest: dict[str, float] = {}
    for seed, (batch, expected) in enumerate(runs):
        with perturbed(model, seed, layers):
            noisy = _call(model, batch, model)
        found = _call(file, batch, model)
        if missing := [name for name in found if name not in expected]:
            raise ValueError(f"the file returns {missing}, the model {list(expected)}")
        for name in found:
            wanted = expected[name].cpu()
            _check_shape(name, found[name], wanted)
            all_of_it = distances.setdefault(name, [Distances(), Distances(), Distances()])
            candidates = (found[name], noisy[name].cpu(), same_codes[name])
            # the layers took the codes of the first batch
            for distance, actual in zip(all_of_it, candidates[: 2 if seed else 3], strict=False):
                distance.add(actual, wanted)
            largest[name] = max(largest.get(name, 0.0), wanted.abs().max().item())
    return [
        Output(name, largest[name], *(distance.distance() for distance in all_of_it))
        for name, all_of_it in distances.items()
    ]
