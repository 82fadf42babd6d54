"""Let Whisper's two files transcribe speech in ONNX Runtime, beside the simulation.

python -m benchmarks.deploy.onnx_transcription --out benchmarks/results/xeon-2-cores

8 bits, the inputs of Linear modules; greedy, on speech that calibration had not heard. After the
first other token two transcripts are two, so the file is also given the simulation's tokens, one by
one, and asked for each next one; and so is the simulation with noise that flips as many codes as
sums in another order do.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import quanttune as qt
from benchmarks import arguments
from benchmarks.provenance import commit
from quanttune.demo.whisper import SECONDS, Whisper, _transcribe
from quanttune.deploy.external_data import size_of
from quanttune.deploy.generation import computed_by
from quanttune.deploy.onnx_model import OnnxModel, has_vnni
from quanttune.deploy.parts import DECODER, ENCODER, part_files
from quanttune.deploy.past import IDS, following
from quanttune.deploy.verification.simulated_codes import perturbed
from quanttune.environment import environment
from quanttune.files import write_json

ROWS = 16  # all that validation has
VERIFIED = 2  # rows whose layers are compared


def main() -> None:
    folder = arguments.of_folder(__doc__).parse_args().out
    job = Whisper(0)
    model: Any = job.prepare(job.arms[0], lambda: None)
    heard = job._splits["validation"].features[:ROWS]
    results: dict[str, Any] = {
        "commit": commit(),
        "environment": {**environment(), "vnni": has_vnni()},
        "seconds_heard": SECONDS,
        "word_error_rate": {"float": job.evaluate(model, "validation")},
    }
    qt.quantize(model, 8, coverage="linear_inputs", data=job.calibration())
    errors = results["word_error_rate"]
    with TemporaryDirectory() as temporary:
        parts = Path(temporary) / "whisper"
        began = time.monotonic()
        qt.export_onnx(model, job._batch([0, 1]), parts, with_past=True)
        results["export_seconds"] = round(time.monotonic() - began)
        results["bytes"] = {p.file: size_of(file) for p, file in part_files(parts).items()}
        wanted = _transcripts(model, heard)
        batch = {"input_features": heard[:VERIFIED], "decoder_input_ids": _cut(wanted[:VERIFIED])}
        results["verified"] = _verified(qt.verify(parts, model, [batch]))
        errors["simulation"] = job.evaluate(model, "validation")
        with computed_by(parts, model):
            own = _transcripts(model, heard)
            errors["files"] = job.evaluate(model, "validation")
        rows = zip(heard.split(1), wanted, own, strict=True)
        results["rows"] = [_beside(parts, model, *row) for row in rows]
    results["shares"] = _shares(results["rows"])
    write_json(folder / "onnx-transcription.json", results)
    print(errors, results["shares"])


def _transcripts(model: Any, heard: Tensor) -> list[Tensor]:
    """Return the tokens of each row, up to the first that ends it."""
    end = model.generation_config.eos_token_id
    rows = [row.cpu() for row in _transcribe(model, heard)]
    return [row[: [*row.tolist(), end].index(end) + 1] for row in rows]


def _cut(rows: list[Tensor]) -> Tensor:
    """Return transcripts as one tensor, cut to the shortest."""
    tokens = min(map(len, rows))
    return torch.stack([row[:tokens] for row in rows])


def _verified(found: Any) -> dict[str, Any]:
    """Return what matters of a verification: its verdict, and how many layers differ at all."""
    return {
        "problems": list(found.problems),
        "layers": len(found.layers),
        "without_a_difference": sum(not layer.differ for layer in found.layers),
    }


@torch.no_grad()
def _beside(folder: Path, model: Any, heard: Tensor, wanted: Tensor, own: Tensor) -> dict[str, Any]:
    """Return how many tokens of a transcript are those of the simulation's `generate`."""
    given = wanted[None, :-1]
    inputs = {"input_features": heard, "decoder_input_ids": given}
    likeliest = model(**inputs).logits.argmax(-1)
    with perturbed(model, 0):
        noisy = model(**inputs).logits.argmax(-1)
    shorter = min(len(own), len(wanted))
    same = own[:shorter] == wanted[:shorter]
    after = _after(folder, heard, given) == likeliest
    return {
        "tokens": given.shape[1],
        "same": int(same.sum()) - 1,  # without the token that all start with
        "first_other": None if torch.equal(own, wanted) else [*same.tolist(), False].index(False),
        "same_after_simulation": int(after.sum()),
        "noise_after_simulation": int((noisy == likeliest).sum()),
    }


def _after(folder: Path, heard: Tensor, given: Tensor) -> Tensor:
    """Return the file's likeliest next tokens behind those that are given one by one."""
    encoder, decoder = (OnnxModel(folder / part.file) for part in (ENCODER, DECODER))
    states = encoder(input_features=heard)["last_hidden_state"]
    call: Mapping[str, Tensor] = {IDS: given[:, :1], "encoder_hidden_states": states}
    found = []
    for token in (*given[:, 1:].split(1, 1), given[:, :1]):  # nothing is asked of the last call
        outputs = decoder(**call)
        found.append(outputs["logits"][:, -1:].argmax(-1))
        call = following(call, outputs, token)
    return torch.cat(found, 1)


def _shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of equal tokens of all rows."""
    tokens = sum(row["tokens"] for row in rows)
    names = ("same", "same_after_simulation", "noise_after_simulation")
    return {name: sum(row[name] for row in rows) / tokens for name in names}


if __name__ == "__main__":
    main()
