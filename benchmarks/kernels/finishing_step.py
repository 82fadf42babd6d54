"""What rounding costs a training step: time and peak memory, beside the float step and others.

python -m benchmarks.kernels.finishing_step time minilm --out DIR   # or memory; or vit, a ViT-B/16

A step is a forward, its loss, a backward and AdamW(fused=True). Weights are random, which changes
no time. Loss and gradients of ours are compared with plain PyTorch's first. All variants take
turns; a library that is not installed is left out. What is rounded, by whom: rounded_training.py.

Memory is the resident set of a fresh process at its peak in a step, less that before the model was
made: parameters, gradients, the optimizer's state and activations count. A step on one row goes
before, so that what is loaded at first use is not counted; gaps between tensors are not, either
(peak_memory.py). Linux only.
"""

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels import rounded_training as rounding
from benchmarks.kernels.peak_memory import CURRENT, peak_of, resident, without_gaps
from benchmarks.markdown_table import table
from benchmarks.provenance import commit
from quanttune.environment import environment
from quanttune.files import write_json

SHAPES = {"minilm": (16, 128), "vit": (8, 3, 224, 224)}
CHECKED = {"minilm": (2, 16), "vit": (1, 3, 224, 224)}
VARIANTS = {
    "float": rounding.unrounded,
    **rounding.OURS,
    "finishing": rounding.finishing,
    **rounding.RIVALS,
}
MODULES = {"nvidia-modelopt": "modelopt"}
TITLES = {"minilm": "MiniLM 16 x 128", "vit": "ViT-B/16 8 x 3 x 224 x 224"}
ROWS = {
    "constant": "constant ranges of activations (`quantize`)",
    "learned": "learned scales, of weights too (`learn_scales`)",
    "following": "ranges that follow, with their gradient (finishing's)",
    "nvidia-modelopt": "ModelOpt, all ranges constant",
    "torchao": "torchao's QAT, a range per token",
    "brevitas": "Brevitas, learned scales of activations",
    "finishing": "finishing as it is: everything rounded but probabilities",
}
MEASURED = ("minilm", "time"), ("minilm", "memory"), ("vit", "time")
UNITS = {"time": "milliseconds", "memory": "mebibytes"}


def main() -> None:
    options = _options()
    if options.peak:
        print(_peak(options.model, options.peak))
        return
    present = [n for n in VARIANTS if n not in rounding.RIVALS or find_spec(MODULES.get(n, n))]
    present = [name for name in present if name in (options.only or present)]
    if options.what == "time":
        check(options.model)
        found = times(options.model, present, options.rounds)
    else:
        found = {name: [memory(options.model, name)] for name in present}
    for name, values in found.items():
        print(f"{name:16} {median(values):8.1f} {ratio([found], name):.3f}x")
    result = {
        "commit": commit(),
        "environment": environment(),
        "shape": SHAPES[options.model],
        "versions": {name: version(name) for name in present if name in rounding.RIVALS},
        UNITS[options.what]: [found],
    }
    if options.out:
        file = options.out / f"finishing-{options.what}-{options.model}.json"
        if options.more:
            before = json.loads(file.read_text())
            result["versions"] |= before["versions"]
            result[UNITS[options.what]] = [*before[UNITS[options.what]], found]
        write_json(file, result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=UNITS)
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--more", action="store_true", help="add to the runs that are there")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each, after one more")
    parser.add_argument("--only", nargs="+", help="the variants to measure, float among them")
    parser.add_argument("--peak", choices=VARIANTS, help="print the memory of one variant")
    return parser.parse_args()


def times(model: str, variants: list[str], rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each step; the variants take turns."""
    steps = {name: Step(model, name) for name in variants}
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = perf_counter()
            step()
            found[name].append(1e3 * (perf_counter() - start))
    return {name: values[1:] for name, values in found.items()}


def ratio(runs: list[dict[str, list[float]]], name: str) -> float:
    """Return a variant's number beside the float step's: the median of the rounds' ratios."""
    of_runs = (zip(run[name], run["float"], strict=True) for run in runs if name in run)
    return median(ours / plain for rounds in of_runs for ours, plain in rounds)


def finishing_table(read: Callable[[str], Any]) -> str:
    """Return the table of what was measured; `read` reads a file of the folder."""
    files = {(model, what): read(f"finishing-{what}-{model}.json") for model, what in MEASURED}
    heads = (f"{TITLES[model]}, {what}" for model, what in files)
    rows = []
    for name, title in ROWS.items():
        measured = [(file[UNITS[what]], name) for (_, what), file in files.items()]
        rows.append((title, *(_cell(*one) for one in measured)))
    return table(("", *heads), rows)


def _cell(runs: list[dict[str, list[float]]], name: str) -> str:
    return f"{ratio(runs, name):.2f}x" if any(name in run for run in runs) else ""


class Step:
    """A training step of one variant of a model."""

    def __init__(self, model: str, variant: str) -> None:
        self.batch = batch(model, SHAPES[model])
        made, self._after = VARIANTS[variant](float_model(model), self.batch)
        self.model = made.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def __call__(self, given: Any = None) -> None:
        loss_of(self.model, given or self.batch).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._after()


def float_model(name: str) -> nn.Module:
    """Return a model with random weights, without dropout, the same at each call."""
    torch.manual_seed(0)
    if name == "vit":
        import timm

        return timm.create_model("vit_base_patch16_224").train()
    from transformers import BertConfig, BertModel

    size = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertModel(BertConfig(**size, num_attention_heads=12, **none), add_pooling_layer=False)
    model.embeddings.word_embeddings.weight.requires_grad_(False)
    return model.train()


def batch(name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return what the model is called with."""
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        return {"x": torch.randn(shape, generator=generator)}
    return {"input_ids": torch.randint(1000, 30000, shape, generator=generator)}


def loss_of(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Run a forward, and return the mean squared distance of the answer from random numbers."""
    answer = model(**given)
    answer = getattr(answer, "last_hidden_state", answer)
    target = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1))
    return (answer - target).square().mean()


def check(name: str) -> None:
    """Compare loss and gradients of ours with plain PyTorch's, on a small batch."""
    given, model = batch(name, CHECKED[name]), float_model(name)
    for kind, make in rounding.OURS.items():
        ours, _ = make(copy.deepcopy(model), given)
        plain = rounding.plain(model, ours.train(), kind).train()
        losses = [loss_of(one, given) for one in (ours, plain)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        _compare(gradients_of(ours), gradients_of(plain), kind)


def _compare(ours: dict[str, Tensor], plain: dict[str, Tensor], kind: str) -> None:
    assert set(plain) <= set(ours), kind
    whole = torch.stack([gradient.norm() for gradient in plain.values()]).norm()
    for name, gradient in plain.items():  # attention's key biases have none but noise
        distance = (ours[name] - gradient).norm()
        assert distance <= 1e-4 * gradient.norm() + 1e-7 * whole, (kind, name)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a model's parameters that have one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def memory(model: str, variant: str) -> float:
    """Return the peak memory of a training step, in MiB."""
    command = [sys.executable, "-m", __spec__.name, "memory", model, "--peak", variant]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=without_gaps()
    )
    return float(done.stdout.split()[-1])


def _peak(model: str, variant: str) -> float:
    batch_of_one = batch(model, (1, *SHAPES[model][1:]))
    before = resident(CURRENT)
    step = Step(model, variant)
    step(batch_of_one)
    return peak_of(step) - before


if __name__ == "__main__":
    main()
