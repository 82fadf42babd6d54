#!/bin/sh
# transformers 5.24.0. A causal language model calls its base model, model.base_model, and puts a head on what that returns:
# whoever looks at it, or changes its arguments, hooks it there. OPTForCausalLM does not call its OPTModel: it calls
# model.model.decoder, so that a hook of model.base_model is never run, and nothing says so. get_decoder() names what is called.
# Seen, how often a hook of base_model and one of get_decoder() ran in one forward: "Llama: 1 1", "GPT2: 1 1", "OPT: 0 1".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile transformers==5.24.0 torch==2.14.1
cd "$folder"
env/bin/python - <<'P' 2>/dev/null
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
more = {"llama": {"intermediate_size": 48}, "gpt2": {}, "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}}
seen = {}
for kind, options in more.items():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **options)).eval()
    calls = [0, 0]
    for which, part in enumerate((model.base_model, model.get_decoder())):
        part.register_forward_hook(lambda *_, which=which: calls.__setitem__(which, calls[which] + 1))
    model(torch.arange(6)[None])
    seen[type(model).__name__.removesuffix("LMHeadModel").removesuffix("ForCausalLM")] = calls
for name, calls in seen.items():
    print(f"{name}:", *calls)
assert seen == {"Llama": [1, 1], "GPT2": [1, 1], "OPT": [0, 1]}, seen
P
