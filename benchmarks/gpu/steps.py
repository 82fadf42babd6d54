"""What observing costs a training step of large models: random weights, bfloat16, SDPA."""

from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import eager
from benchmarks.gpu.machine import Machine
from quanttune import attach

STEPS, ROUNDS = 4, 3  # the variants take turns
VARIANTS = ("without", "with")  # the observer
ALPHA, MANY = 1e-3, 10**9  # so small that nothing is drowned; it stays what it is
LOSS = Callable[[nn.Module], Tensor]


def steps(machine: Machine) -> dict[str, Any]:
    """Train each model without the observer and with it; time and peak memory."""
    models = _dry_models() if machine.dry else _models()
    return {"rows": [_compare(machine, name, make) for name, make in models.items()]}


def _models() -> dict[str, Callable[[Machine], tuple[nn.Module, LOSS]]]:
    opt_350m = {
        "hidden_size": 1024, "num_attention_heads": 16, "ffn_dim": 4096, "num_hidden_layers": 24,
        "word_embed_proj_dim": 512, "do_layer_norm_before": False,
    }  # fmt: skip
    opt_1b = {
        "hidden_size": 2048, "num_attention_heads": 32, "ffn_dim": 8192, "num_hidden_layers": 24,
    }  # fmt: skip
    opt_7b = {
        "hidden_size": 4096, "num_attention_heads": 32, "ffn_dim": 16384, "num_hidden_layers": 8,
    }  # fmt: skip
    return {
        "ViT-B": partial(_vit, name="vit_base_patch16_224", images=64),
        "OPT-350m": partial(_opt, tokens=(8, 2048), **opt_350m),
        "OPT-1.3B": partial(_opt, tokens=(8, 2048), **opt_1b),
        "OPT-6.7B": partial(_opt, tokens=(8, 2048), **opt_7b),
    }


def _dry_models() -> dict[str, Callable[[Machine], tuple[nn.Module, LOSS]]]:
    tiny = {
        "hidden_size": 32, "num_attention_heads": 2, "ffn_dim": 64, "num_hidden_layers": 1,
        "vocab_size": 100,
    }  # fmt: skip
    return {
        "ViT-B": partial(_vit, name="test_vit", images=2),
        "OPT-350m": partial(
            _opt, tokens=(2, 8), word_embed_proj_dim=16, do_layer_norm_before=False, **tiny
        ),
        "OPT-1.3B": partial(_opt, tokens=(2, 8), **tiny),
    }


def _vit(machine: Machine, name: str, images: int) -> tuple[nn.Module, LOSS]:
    import timm

    with torch.device(machine.device):
        model = timm.create_model(name).to(torch.bfloat16)
    side = model.default_cfg["input_size"][-1]
    x = eager.normal((images, 3, side, side), torch.bfloat16, machine.device)
    labels = torch.arange(images, device=machine.device) % model.num_classes
    return model, lambda model: F.cross_entropy(model(x).float(), labels)


def _opt(machine: Machine, tokens: tuple[int, int], **settings: Any) -> tuple[nn.Module, LOSS]:
    from transformers import AutoModelForCausalLM, OPTConfig

    config = OPTConfig(
        dropout=0.0,
        attention_dropout=0.0,
        **{"word_embed_proj_dim": settings["hidden_size"], **settings},
    )
    with torch.device(machine.device):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    generator = torch.Generator(machine.device).manual_seed(0)
    ids = torch.randint(config.vocab_size, tokens, generator=generator, device=machine.device)
    return model, lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss


def _compare(
    machine: Machine, name: str, make: Callable[[Machine], tuple[nn.Module, LOSS]]
) -> dict[str, Any]:
    torch.manual_seed(0)
    model, loss_of = make(machine)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    peaks = dict.fromkeys(VARIANTS, 0.0)
    for turn in range(1 + (1 if machine.dry else ROUNDS)):
        for variant in VARIANTS:
            tuner = None
            if variant == "with":
                tuner = attach(model, ALPHA, total_steps=MANY, detach_deviation=True)
            step = partial(_step, model, loss_of, optimizer, tuner)
            milliseconds, peak = _measure(machine, step)
            if turn:  # the first turn compiles, and makes the state of the optimizer
                times[variant].append(milliseconds)
                peaks[variant] = max(peaks[variant], peak)
            if tuner is not None:
                tuner.detach()
    result = {key: median(values) for key, values in times.items()}
    row = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "milliseconds": result,
        "time_ratio": result["with"] / result["without"],
        "peak_gib": peaks,
    }
    del model, optimizer, step
    if not machine.dry:
        torch.cuda.empty_cache()
    return row


def _step(model: nn.Module, loss_of: LOSS, optimizer: torch.optim.Optimizer, tuner: Any) -> None:
    loss = loss_of(model)
    (tuner.combine(loss) if tuner else loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def _measure(machine: Machine, step: Callable[[], None]) -> tuple[float, float]:
    """Return the milliseconds of a step, and the peak of allocated memory in GiB."""
    step()  # the first of a tuner compares gradients
    machine.synchronize()
    if not machine.dry:
        torch.cuda.reset_peak_memory_stats()
    start = perf_counter()
    for _ in range(STEPS):
        step()
    machine.synchronize()
    milliseconds = 1e3 * (perf_counter() - start) / STEPS
    peak = 0.0 if machine.dry else torch.cuda.max_memory_allocated() / 2**30
    return milliseconds, peak
