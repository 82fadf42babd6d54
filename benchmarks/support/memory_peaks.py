"""Compare memory.py with what PyTorch allocates on a CPU: OPT-125m and OPT-350m, random weights.

python -m benchmarks.support.memory_peaks --out benchmarks/results/xeon-2-cores

A process for each way to take a step. Its peak is that of PyTorch's allocator, as the profiler is
told of each allocation; the resident memory of a process has libraries and what malloc keeps in it.
Twenty minutes on two slow cores; it goes on where it was stopped.
"""

import gc
import json
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from benchmarks import arguments
from benchmarks.provenance import commit
from benchmarks.support.memory import Step, need
from quanttune.environment import environment
from quanttune.files import write_json

# shapes of the published models: config.json of facebook/opt-*
SIZES: dict[str, dict[str, Any]] = {
    "OPT-125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "OPT-350m": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "word_embed_proj_dim": 512, "do_layer_norm_before": False,
    },
    "OPT-1.3B": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32},
    "OPT-6.7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
    "OPT-13B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40},
}  # fmt: skip


def config_of(name: str) -> Any:
    """Return the configuration of an OPT as it was published."""
    from transformers import OPTConfig

    sizes = SIZES[name]
    h = sizes["hidden_size"]
    return OPTConfig(**{"ffn_dim": 4 * h, "word_embed_proj_dim": h, "use_cache": False, **sizes})


def main() -> None:
    folder = arguments.of_folder(__doc__).parse_args().out
    file = folder / "memory.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    done = [(row["model"], row["step"]) for row in rows]
    for name, step in ways():
        if (name, asdict(step)) in done:
            continue
        command = [sys.executable, "-m", __spec__.name, name, json.dumps(asdict(step))]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append({"model": name, "step": asdict(step), **json.loads(found.stdout)})
        print(name, step, compared(rows[-1]), flush=True)
        write_json(file, {"commit": commit(), "environment": environment(), "rows": rows})


def ways() -> list[tuple[str, Step]]:
    """Return every model and step that is measured."""
    return [
        (name, Step(batch, 256, *flags, lora_rank=rank, fused_dropout=False))
        for name, batch, rank in (("OPT-125m", 4, 0), ("OPT-350m", 2, 0), ("OPT-125m", 4, 16))
        for flags in product((False, True), repeat=3)  # bf16, attached, checkpoints
    ]


def compared(row: dict[str, Any]) -> dict[str, float]:
    """Return how far the arithmetic is from a measured row: of all, and of what a step adds."""
    estimate = need(config_of(row["model"]), Step(**row["step"]))
    added = row["peak"] - row["state"]
    return {
        "peak": estimate.peak / row["peak"] - 1,
        "added": (estimate.peak - estimate.state) / added - 1,
    }


def measure(name: str, step: Step) -> dict[str, int]:
    """Return the bytes before the second step, and at most within it."""
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    config = config_of(name)
    gc.collect()  # what is left of another model is not to be freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        take = stepper(config, step)
        take(1, 8)
        with torch.profiler.record_function("measured"):
            take(step.batch, step.tokens)
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    (mark,) = [e for e in events if e.name() == "measured"]
    total, peak, state = 0, 0, 0
    for event in events:
        if event.name() != "[memory]":
            continue
        total += event.nbytes()
        if event.start_ns() < mark.start_ns():
            state = total
        else:
            peak = max(peak, total)
    return {"state": state, "peak": peak}


def stepper(config: Any, step: Step) -> Any:
    """Return what takes a step of so many rows of so many tokens."""
    from transformers import OPTForCausalLM

    import quanttune as qt

    model: Any = OPTForCausalLM(config).train()
    if step.lora_rank:
        from quanttune.jobs.adapters import add_adapters

        model = add_adapters(model, step.lora_rank, [])
    if step.checkpoints:
        plain = model.get_base_model() if step.lora_rank else model
        plain.activation_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    tuner = qt.attach(model, 0.5, "constant") if step.attached else None

    def take(batch: int, tokens: int) -> None:
        words = torch.randint(5, config.vocab_size, (batch, tokens))
        with torch.autocast("cpu", torch.bfloat16, enabled=step.bf16):
            loss = model(input_ids=words, labels=words).loss
        loss = tuner.combine(loss) if tuner else loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return take


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in SIZES:
        print(json.dumps(measure(sys.argv[1], Step(**json.loads(sys.argv[2])))))
    else:
        main()
