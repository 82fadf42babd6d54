#!/bin/sh
# litert-torch 0.10.0, ai-edge-litert 2.3.0. A tensor that is rounded (quantize, dequantize) and one that is not are put side by side,
# and the result is not rounded, as a Vision Transformer puts its class token beside rounded patches. Converted with its quantization
# (quant_config), the concatenation is one of int8: the tensor that was not rounded is rounded to the grid of the other, without a
# message. Class tokens begin near .02; beside patches whose steps are .1 they become 0. The same sum of two padded tensors is right.
# Seen: "program [0.02, 0.5], concatenated [0.0, 0.5], padded and added [0.02, 0.5]".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile litert-torch==0.10.0 ai-edge-litert==2.3.0 torch==2.14.1
cd "$folder"
cat > case.py <<'P'
import litert_torch
import torch
import torch.ao.quantization.fx._decomposed
from ai_edge_litert.interpreter import Interpreter
from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
from litert_torch.quantize.quant_config import QuantConfig
from torch.nn import functional as F

ops = torch.ops.quantized_decomposed
STATIC = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config()))
GRID = 0.1, 0, -128, 127, torch.int8


class Token(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.token = torch.nn.Parameter(torch.full((1, 1, 4), 0.02))


class Concatenated(Token):
    def forward(self, x):
        x = ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *GRID), *GRID)
        return torch.tanh(torch.cat([self.token, x], 1))


class Padded(Token):
    def forward(self, x):
        x = ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *GRID), *GRID)
        return torch.tanh(F.pad(self.token, (0, 0, 0, 1)) + F.pad(x, (0, 0, 1, 0)))


x, found = torch.full((1, 1, 4), 0.5), []
for module in (Concatenated(), Padded()):
    litert_torch.convert(module.eval(), (x,), quant_config=STATIC).export("model.tflite")
    interpreter = Interpreter(model_path="model.tflite")
    interpreter.allocate_tensors()
    (source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(source["index"], torch.full((1, 1, 4), 5).numpy().astype(source["dtype"]))  # 5 * .1 is .5
    interpreter.invoke()
    found.append([round(float(torch.tensor(interpreter.get_tensor(result["index"])).atanh()[0, i, 0]), 3) for i in (0, 1)])
expected = [round(float(value), 3) for value in Concatenated()(x).atanh()[0, :, 0]]
print(f"program {expected}, concatenated {found[0]}, padded and added {found[1]}")
assert expected == found[1] == [0.02, 0.5] and found[0] == [0.0, 0.5]
P
env/bin/python case.py
