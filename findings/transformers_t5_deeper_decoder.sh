#!/bin/sh
# transformers 5.24.0. generate() fails for a T5 with more layers in its decoder than in its encoder (num_decoder_layers, a setting of
# its configuration): the cache gets as many layers as num_layers, the encoder's, and the next layer's keys have no place in it. With
# use_cache=False it answers. A BART of the same shape generates.
# Seen, for 2 layers of an encoder and 3 of a decoder: "T5: IndexError", "T5, use_cache=False: 4 tokens", "BART: 4 tokens".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile transformers==5.24.0 torch==2.14.1
cd "$folder"
env/bin/python - <<'P' 2>/dev/null
import torch
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

tokens = {"vocab_size": 64, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
t5 = T5Config(num_layers=2, num_decoder_layers=3, num_heads=4, d_kv=8, d_ff=48, **tokens)
bart = BartConfig(encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
                  encoder_ffn_dim=48, decoder_ffn_dim=48, bos_token_id=1, **tokens)
cases = {
    "T5": (T5ForConditionalGeneration(t5), {}),
    "T5, use_cache=False": (T5ForConditionalGeneration(t5), {"use_cache": False}),
    "BART": (BartForConditionalGeneration(bart), {}),
}
found = {}
for name, (model, options) in cases.items():
    try:
        ids = model.eval().generate(torch.arange(5)[None] + 3, min_new_tokens=3, max_new_tokens=3, **options)
        found[name] = f"{ids.shape[1]} tokens"
    except IndexError as error:
        found[name] = type(error).__name__
    print(f"{name}: {found[name]}")
assert found == {"T5": "IndexError", "T5, use_cache=False": "4 tokens", "BART": "4 tokens"}, found
P
