"""Let SmolLM2's file with keys and values generate in ONNX Runtime, beside its simulation.

python -m benchmarks.deploy.onnx_generation --out benchmarks/results/xeon-2-cores

8 bits, linear, behind a kept prefix, rotated and smoothed; greedy, on beginnings of docstrings that
calibration had not seen, one alone and three padded from the left. After the first other token two
texts are two, so the file is also given the simulation's tokens and asked for each next one; and so
is the simulation with noise that flips as many codes as sums in another order do.
"""

import time
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import quanttune as qt
from benchmarks import arguments
from benchmarks.provenance import commit
from quanttune.demo.smollm2 import SmolLM2
from quanttune.deploy.external_data import size_of
from quanttune.deploy.onnx_model import OnnxModel, has_vnni
from quanttune.deploy.past import following, prompt
from quanttune.deploy.verification.simulated_codes import perturbed
from quanttune.environment import environment
from quanttune.files import write_json
from quanttune.quantization.methods import SmoothQuant

COMMA = [28]  # the prefix that calibration rows choose: docs/prefix.md
NEW = 64  # tokens
LENGTHS = (32, 24, 12)  # of the rows of a batch of three; those alone have the first
ALONE, TOGETHER = 3, 2  # batches


def main() -> None:
    folder = arguments.of_folder(__doc__).parse_args().out
    job = SmolLM2(0)
    model: Any = qt.prefix(job.prepare(job.arms[0], lambda: None), COMMA)
    methods: list[Any] = ["rotate", "smooth_inputs", SmoothQuant(alpha=0.9)]
    calibration = job.calibration()[:1]  # how well it answers is not what is measured here
    qt.quantize(model, 8, coverage="linear", methods=methods, data=calibration)
    model.generation_config.eos_token_id = None  # all texts are as long
    results: dict[str, Any] = {
        "commit": commit(),
        "environment": {**environment(), "vnni": has_vnni()},
        "prefix": COMMA,
        "tokens": NEW,
        "rows": [],
    }
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        example = {"input_ids": job.rows.tuning[:2, :8]}
        began = time.monotonic()
        qt.export_onnx(model, example, path, with_past=True)
        results |= {"bytes": size_of(path), "export_seconds": round(time.monotonic() - began)}
        file = OnnxModel(path)
        for batch in _batches(job.rows.validation):
            row = _beside(file, model, batch)
            print(row, flush=True)
            results["rows"].append(row)
            results["shares"] = {size: _shares(results["rows"], size) for size in (1, 3)}
            write_json(folder / "onnx-generation.json", results)


def _batches(rows: Tensor) -> list[dict[str, Tensor]]:
    """Return single rows, and threes that are padded from the left, in turns."""
    alone = [
        {"input_ids": row[None, : LENGTHS[0]], "attention_mask": torch.ones(1, LENGTHS[0]).long()}
        for row in rows[:ALONE]
    ]
    together = []
    for three in rows[ALONE : ALONE + 3 * TOGETHER].split(3):
        ids, mask = (torch.zeros(3, LENGTHS[0], dtype=torch.long) for _ in range(2))
        for i, length in enumerate(LENGTHS):
            ids[i, -length:], mask[i, -length:] = three[i, :length], 1
        together.append({"input_ids": ids, "attention_mask": mask})
    turns = zip_longest(alone, together)
    return [batch for turn in turns for batch in turn if batch is not None]


@torch.no_grad()
def _beside(file: OnnxModel, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return how many tokens of each row are those of the simulation's `generate`."""
    greedy = {"do_sample": False, "max_new_tokens": NEW, "use_cache": True}
    whole = model.generate(**batch, **greedy)
    wanted = whole[:, -NEW:]
    same = _generated(file, model, batch) == wanted
    firsts = [row.tolist().index(False) if not row.all() else None for row in same]
    return {
        "batch": len(wanted),
        "different_tokens": len(wanted.unique()),
        "same": same.sum(1).tolist(),
        "first_other": firsts,
        "same_after_simulation": _told(_generated(file, model, batch, wanted), wanted),
        "noise_after_simulation": _told(_noisy(model, batch, whole), wanted),
    }


def _generated(
    file: OnnxModel, model: nn.Module, batch: Any, given: Tensor | None = None
) -> Tensor:
    """Return the greedy tokens of a file, behind its own or those that are given."""
    call, found = prompt(batch, model), []
    for i in range(NEW):
        outputs = file(**call)
        found.append(outputs["logits"][:, -1:].argmax(-1))
        call = following(call, outputs, found[-1] if given is None else given[:, i : i + 1])
    return torch.cat(found, 1)


def _noisy(model: nn.Module, batch: Mapping[str, Tensor], whole: Tensor) -> Tensor:
    """Return what the simulation with noise takes for the next token, of a whole text at once."""
    more = whole.shape[1] - batch["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, more), value=1)
    call = prompt({"input_ids": whole, "attention_mask": mask}, model)
    with perturbed(model, 0):
        return model(**call).logits[:, -NEW - 1 : -1].argmax(-1)  # type: ignore[no-any-return]


def _told(found: Tensor, wanted: Tensor) -> list[int]:
    return (found == wanted).sum(1).tolist()  # type: ignore[no-any-return]


def _shares(rows: list[dict[str, Any]], size: int) -> dict[str, float]:
    """Return the shares of equal tokens of all batches of a size."""
    names = ("same", "same_after_simulation", "noise_after_simulation")
    found = {name: [n for row in rows if row["batch"] == size for n in row[name]] for name in names}
    return {name: sum(counts) / (NEW * len(counts)) for name, counts in found.items() if counts}


if __name__ == "__main__":
    main()
