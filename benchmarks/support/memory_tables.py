"""The tables of docs/large_models.md, of memory.py's arithmetic and of peaks that were measured."""

from dataclasses import replace
from typing import Any

from benchmarks.markdown_table import table
from benchmarks.support.memory import Need, Step, need, observed, operations
from benchmarks.support.memory_peaks import compared, config_of

LARGE = "OPT-1.3B", "OPT-6.7B", "OPT-13B"
STEP = Step(batch=8, tokens=512, attached=True)
WAYS = {
    "float32": STEP,
    "bf16": replace(STEP, bf16=True),
    "bf16, LoRA 16": replace(STEP, bf16=True, lora_rank=16),
}
CARDS = 80e9, 141e9
FILLED = 0.9  # of a card; the rest is for fragments, the context and the libraries
MOST = 64  # devices
FLOPS = 400e12  # 40 % of an H100's 989e12 in dense bf16
BANDWIDTH = 3.35e12  # bytes per second of an H100
PASSES = (
    4  # over what is observed: its statistics; it, the gradient that comes in, the one that goes
)


def needs_table() -> str:
    """Return what the large ones need, on one device and on several."""
    heads = (
        "", "state", "gradients", "kept", "peak", "of it QuantTune's", "cards of 80 GB",
        "of 141 GB", "s per step", "QuantTune's",
    )  # fmt: skip
    return table(heads, [_row(*way) for way in _ways()])


def _ways() -> list[tuple[str, str, Step]]:
    return [
        (
            name,
            way + (", checkpoints" if checkpoints else ""),
            replace(step, checkpoints=checkpoints),
        )
        for name in LARGE
        for way, step in WAYS.items()
        for checkpoints in (False, True)
    ]


def _row(name: str, way: str, step: Step) -> tuple[str, ...]:
    config = config_of(name)
    found, plain = need(config, step), need(config, replace(step, attached=False))
    parts = found.state, found.gradients, found.activations, found.peak, found.peak - plain.peak
    seconds = f"{operations(config, step) / FLOPS:.2f}" if step.bf16 else ""
    passed = PASSES * observed(config, step) / BANDWIDTH
    cards = [_cards(config, step, card) for card in CARDS]
    return f"{name}, {way}", *map(_gigabytes, parts), *cards, seconds, f"{passed:.2f}"


def _cards(config: Any, step: Step, size: float) -> str:
    """Return how many devices FSDP2 shards over until a step fits, doubling them."""
    devices = 1
    while need(config, replace(step, devices=devices)).peak > FILLED * size:
        devices *= 2
        if devices > MOST:
            return "none"
    return str(devices)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f}"


def peaks_table(measured: Any) -> str:
    """Return what was measured, and how far the arithmetic is from it."""
    heads = "", "state", "peak", "estimate", "off", "off, state apart"
    rows = []
    for row in measured["rows"]:
        step = Step(**row["step"])
        estimate: Need = need(config_of(row["model"]), step)
        flags = [
            f"LoRA {step.lora_rank}" if step.lora_rank else "",
            "bf16" if step.bf16 else "float32",
            "checkpoints" if step.checkpoints else "",
            "QuantTune" if step.attached else "",
        ]
        sizes = (f"{size / 1e6:.0f}" for size in (row["state"], row["peak"], estimate.peak))
        off = compared(row)
        ends = (f"{off[part]:+.1%}" for part in ("peak", "added"))
        label = f"{row['model']}, {step.batch} x {step.tokens}"
        rows.append((", ".join([label, *filter(None, flags)]), *sizes, *ends))
    return table(heads, rows)
