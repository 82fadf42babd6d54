#!/bin/sh
# transformers 5.24.0, gguf 0.19.0, torch 2.14.1, without the package kernels. from_pretrained(folder, gguf_file=...) turns the
# few-bit weights of a GGUF file into float32 tensors of nn.Linear modules where no kernel multiplies packed ones, and warns
# that it does. The model still counts as quantized: .float() and .half() raise (.to(torch.bfloat16) does not), save_pretrained
# raises "not serializable", Trainer raises "cannot perform fine-tuning on purely quantized models".
# Whoever reads a GGUF file to tune it has to pass quantization_config=GgufConfig(dequantize=True); then all of these work,
# and the parameters are the same bits. The same code did without it as long as GGUF files were always unpacked.
# Seen: "default: Linear float32, refused: float save_pretrained Trainer", "dequantize=True: Linear float32, refused: nothing",
# "same weights: True".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q transformers==5.24.0 gguf==0.19.0 torch==2.14.1 accelerate==1.15.0
cd "$folder"
env/bin/python -W ignore - <<'P' 2>/dev/null
import gguf, numpy as np, torch
from transformers import AutoModelForCausalLM, GgufConfig, Trainer, TrainingArguments

# a Llama of one layer, its matrices in blocks of 8 bits (Q8_0)
random = np.random.default_rng(0)
writer = gguf.GGUFWriter("tiny.gguf", "llama")
for name, value in {"context_length": 32, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64,
                    "head_count": 2, "head_count_kv": 2, "rope_dimension_count": 16, "vocab_size": 64}.items():
    getattr(writer, "add_" + name)(value)
writer.add_layer_norm_rms_eps(1e-5)
block = "blk.0."
shapes = {"token_embd.weight": (64, 32), block + "attn_q.weight": (32, 32), block + "attn_k.weight": (32, 32),
          block + "attn_v.weight": (32, 32), block + "attn_output.weight": (32, 32), block + "ffn_gate.weight": (64, 32),
          block + "ffn_up.weight": (64, 32), block + "ffn_down.weight": (32, 64)}
for name, shape in shapes.items():
    blocks = gguf.quantize(random.normal(size=shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
for name in (block + "attn_norm.weight", block + "ffn_norm.weight", "output_norm.weight"):
    writer.add_tensor(name, np.ones(32, np.float32))
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()

def read(name, **options):
    model = AutoModelForCausalLM.from_pretrained(".", gguf_file="tiny.gguf", **options)
    linear = model.model.layers[0].mlp.down_proj
    refused = []
    for what, do in {"float": model.float, "save_pretrained": lambda: model.save_pretrained("saved"),
                     "Trainer": lambda: Trainer(model, TrainingArguments("out", use_cpu=True))}.items():
        try:
            do()
        except ValueError as error:
            refused.append(what)
            assert "quantized" in str(error), error
    print(f"{name}: {type(linear).__name__} {str(linear.weight.dtype)[6:]}, refused: {' '.join(refused) or 'nothing'}")
    return model.state_dict(), refused

first, refused = read("default")
second, none = read("dequantize=True", quantization_config=GgufConfig(dequantize=True))
same = first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
print("same weights:", same)
assert same and not none and refused == ["float", "save_pretrained", "Trainer"], (refused, none)
P
