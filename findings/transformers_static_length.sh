#!/bin/sh
# transformers 5.24.0. cache.get_seq_length() tells how many tokens a cache holds: an int for a DynamicCache, for a StaticCache
# a tensor. That tensor is the cache's own counter, which the next forward adds to in place. So a length that was read before
# a forward is another one after it: what the forward added comes out as 0, and a length kept to go back to is that of now.
# Seen, for 6 tokens and then 1 more: "DynamicCache: 6 before, 1 added", "StaticCache: 7 before, 0 added".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile transformers==5.24.0 torch==2.14.1
cd "$folder"
env/bin/python - <<'P' 2>/dev/null
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(0, 64, (1, 7))
seen = {}
for cache in (DynamicCache(config=config), StaticCache(config, max_cache_len=16)):
    with torch.no_grad():
        model(ids[:, :6], cache=cache)
        before = cache.get_seq_length()
        model(ids[:, 6:], cache=cache)
    seen[type(cache).__name__] = int(before), int(cache.get_seq_length() - before)
    print(f"{type(cache).__name__}: {int(before)} before, {seen[type(cache).__name__][1]} added")
assert seen == {"DynamicCache": (6, 1), "StaticCache": (7, 0)}, seen
P
