"""What observing costs a training step of MiniLM-L6: its time and its peak memory.

The encoder of the minilm demo with its settings: no dropout, no pooler, the table of words frozen.
The three variants train on the same rows: "without" quanttune, "with" it attached, and "plain",
hooks that compute eq. 2 in plain PyTorch on the same tensors, each once, with the deviation held
constant as well.

Memory is the resident set of a fresh process: its peak in a forward and backward, less what was
resident before them (peak_memory.py). That counts what torch, its libraries and our kernels
allocate, as a tensor profiler would not. A step on one row goes before, so that what is loaded at
first use is not counted. Linux only.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from benchmarks import eager
from benchmarks.kernels.peak_memory import peak_above, without_gaps
from benchmarks.timing import medians
from quanttune import attach
from quanttune.demo.minilm import load_encoder, packaged_model
from quanttune.tuning.sites import find_sites

ALPHA, MANY = 0.5, 10**9  # the weight stays what it is


class PlainObservers:
    """Eq. 2 in plain PyTorch, over the inputs and outputs of every site."""

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # the tensor is kept: its id stays taken
        self._ratios: list[Tensor] = []
        for module in find_sites(model).values():
            module.register_forward_pre_hook(lambda _, args: self._observe(args[0]))
            module.register_forward_hook(lambda _, args, output: self._observe(output))

    def combine(self, task: Tensor) -> Tensor:
        """Return the weighted sum of both losses, over all tensors since the last call."""
        self.outlier_loss = torch.stack(self._ratios).mean()
        self._known, self._ratios = {}, []
        return (1 - ALPHA) * task + ALPHA * self.outlier_loss

    def _observe(self, x: Tensor) -> None:
        if id(x) not in self._known:
            rows = x.reshape(len(x), -1)
            magnitude = rows.abs()
            spread = magnitude.amax(1) - magnitude.median(1).values
            self._known[id(x)] = x, spread / rows.detach().std(1)
        self._ratios.append(self._known[id(x)][1])


class Step:
    """A training step of one variant of the model."""

    def __init__(self, variant: str) -> None:
        logging.set_verbosity_error()  # it reports that the checkpoint has a pooler
        logging.disable_progress_bar()
        self.model = load_encoder(packaged_model()).train()
        self.tuner: Any = None
        if variant == "with":
            self.tuner = attach(self.model, ALPHA, total_steps=MANY, detach_deviation=True)
        elif variant == "plain":
            self.tuner = PlainObservers(self.model)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def backward(self, ids: Tensor, target: Tensor) -> None:
        """Run forward, loss and backward."""
        hidden = self.model(input_ids=ids).last_hidden_state
        loss = 100 * (hidden - target).square().mean()
        (self.tuner.combine(loss) if self.tuner else loss).backward()

    def __call__(self, ids: Tensor, target: Tensor) -> None:
        self.backward(ids, target)
        self.optimizer.step()
        self.optimizer.zero_grad()


def times(variants: tuple[str, ...], samples: int, tokens: int, seconds: float) -> dict[str, float]:
    """Return the median milliseconds of a step of each variant, which take turns."""
    steps = {variant: Step(variant) for variant in variants}
    rows = _rows(samples, tokens)
    calls: dict[str, Callable[[], None]] = {name: partial(steps[name], *rows) for name in steps}
    return medians(calls, seconds)


def check(samples: int = 2, tokens: int = 128) -> None:
    """Check that the outlier loss with quanttune is that of the plain hooks."""
    ours, plain = Step("with"), Step("plain")
    for step in (ours, plain):
        step(*_rows(samples, tokens))
    torch.testing.assert_close(
        ours.tuner.outlier_loss, plain.tuner.outlier_loss.detach(), rtol=eager.SAMPLED, atol=0
    )


def memory(variant: str, samples: int, tokens: int) -> float:
    """Return the peak memory of a forward and backward above the loaded model, in MiB."""
    command = [sys.executable, "-m", __spec__.name, variant, str(samples), str(tokens)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=without_gaps()
    )
    return float(done.stdout)


def _rows(samples: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (samples, tokens), generator=generator)
    return ids, torch.randn(samples, tokens, 384, generator=generator)


def _measure_memory() -> None:
    parser = argparse.ArgumentParser(description="Print the peak memory of one variant in MiB.")
    parser.add_argument("variant", choices=("without", "with", "plain"))
    parser.add_argument("samples", type=int)
    parser.add_argument("tokens", type=int)
    options = parser.parse_args()
    step, rows = Step(options.variant), _rows(options.samples, options.tokens)
    step.backward(*_rows(1, options.tokens))
    step.optimizer.zero_grad()
    print(peak_above(partial(step.backward, *rows)))


if __name__ == "__main__":
    _measure_memory()
