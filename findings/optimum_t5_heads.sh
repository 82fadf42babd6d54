#!/bin/sh
# optimum-onnx 0.1.0 (with transformers 4.57.6, the newest that it takes). ORTModelForSeq2SeqLM cannot run the merged decoder of a T5
# whose heads have other than d_model / num_heads channels (d_kv), though it exported the file itself: for the first call, which has no
# past, it makes keys of no token and of d_model / num_heads channels, and ONNX Runtime refuses them. flan-t5-small and mt5-small are
# such models (512 / 6 heads, of 64 channels each). The same model in three files, use_merged=False, answers.
# Seen, for d_model 32 and 4 heads: "d_kv 8, merged: equal", "d_kv 16, three files: equal",
# "d_kv 16, merged: InvalidArgument, index: 3 Got: 8 Expected: 16".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile optimum==2.1.0 optimum-onnx==0.1.0 transformers==4.57.6 torch==2.14.1 \
    onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
env/bin/python - <<'P' 2>/dev/null
import re
import torch
from optimum.onnxruntime import ORTModelForSeq2SeqLM
from transformers import T5Config, T5ForConditionalGeneration

ids = torch.arange(10)[None] + 3
options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8}
found = {}
for d_kv, is_merged in ((8, True), (16, False), (16, True)):
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=d_kv, d_ff=48, num_heads=4, num_layers=1, pad_token_id=0,
                      eos_token_id=1, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained("t5")
    exported = ORTModelForSeq2SeqLM.from_pretrained("t5", export=True, use_merged=is_merged)
    try:
        answer = exported.generate(ids, **options)
        said = "equal" if torch.equal(answer, model.generate(ids, **options)) else "another"
    except Exception as error:
        said = f"{type(error).__name__}, {re.search('index: 3 Got: .* Expected: [0-9]+', str(error))[0]}"
    name = f"d_kv {d_kv}, {'merged' if is_merged else 'three files'}"
    found[name] = said
    print(f"{name}: {said}")
assert list(found.values()) == ["equal", "equal", "InvalidArgument, index: 3 Got: 8 Expected: 16"], found
P
