"""A training step of one language model without and with the outlier loss, in turns."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from quanttune import attach

# the weight stays what it is, and is small: random weights have no task that would outweigh more
ALPHA, MANY = 0.01, 10**9
LEAST = 5  # rounds, and until they have taken the seconds


def smollm2(rows: int, tokens: int) -> tuple[nn.Module, Tensor]:
    """Return a model of SmolLM2-135M's shape with random weights, and a batch for it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), torch.randint(4, 49152, (rows, tokens))


def step_times(model: nn.Module, ids: Tensor, seconds: float) -> dict[str, float]:
    """Return the median milliseconds of a step without ("plain") and with the loss ("observed").

    The optimizer is SGD: the state of Adam needs twice the memory of the parameters, and neither
    is ours.
    """
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-9)  # the same work at each step

    def plain() -> float:
        return seconds_of(partial(step, model, ids, optimizer, None))

    def observed() -> float:
        tuner = attach(model, ALPHA, total_steps=MANY, detach_deviation=True)
        step(model, ids, optimizer, tuner)  # the first one plans what later ones do
        taken = seconds_of(partial(step, model, ids, optimizer, tuner))
        _check(tuner.outlier_loss)
        tuner.detach()
        return taken

    return _in_turns({"plain": plain, "observed": observed}, seconds)


def backward(model: nn.Module, ids: Tensor, tuner: Any) -> None:
    """Run forward, loss and backward."""
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    (tuner.combine(loss) if tuner else loss).backward()


def step(model: nn.Module, ids: Tensor, optimizer: Any, tuner: Any) -> None:
    """Train on a batch."""
    backward(model, ids, tuner)
    optimizer.step()
    optimizer.zero_grad()
    if tuner:
        tuner.step()


def _in_turns(calls: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, float]:
    """Return the median milliseconds of calls that return their seconds and take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    until = perf_counter() + seconds
    while len(samples[next(iter(calls))]) < LEAST or perf_counter() < until:
        for name, call in calls.items():
            samples[name].append(call())
    return {name: 1e3 * median(times) for name, times in samples.items()}


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = perf_counter()
    call()
    return perf_counter() - start


def _check(outlier_loss: Tensor) -> None:
    """Check that what was timed had a loss: of normal activations about 3 to 5 deviations."""
    if not 1 < outlier_loss.item() < math.inf:
        raise RuntimeError(f"the outlier loss of random weights was {outlier_loss.item()}")
