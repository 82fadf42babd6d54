#!/bin/sh
# litert-torch 0.10.0, ai-edge-litert 2.3.0. A program that takes floats, rounds them, adds and rounds again ends in a
# dequantize, and returns floats. Converted with its quantization (quant_config), the dequantize at its end is gone, and
# so is a quantize at its beginning: the converted model returns int8 codes in place of the values, and takes codes.
# No message; called like the module, it returns numbers of another magnitude. Users who compare answers, or take the
# largest of several outputs of different scales, meet it.
# Seen, for 1.5 + 1.5: "program 3.0 float32, converted 75 int8; inputs int8".
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
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
from litert_torch.quantize.quant_config import QuantConfig

ops = torch.ops.quantized_decomposed
STATIC = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config()))


def rounded(x, scale, zero=0):
    grid = scale, zero, -128, 127, torch.int8
    return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *grid), *grid)


class Sum(torch.nn.Module):
    def forward(self, x):
        x = rounded(x, 0.025)
        return rounded(x + x, 0.04)


x = torch.full((1, 4), 1.5)
expected = Sum()(x)
litert_torch.convert(Sum().eval(), (x,), quant_config=STATIC).export("model.tflite")
interpreter = Interpreter(model_path="model.tflite")
interpreter.allocate_tensors()
(source,), (result,) = interpreter.get_input_details(), interpreter.get_output_details()
interpreter.set_tensor(source["index"], np.full((1, 4), 60, source["dtype"]))  # 60 * .025 is 1.5
interpreter.invoke()
found = interpreter.get_tensor(result["index"])
print(f"program {expected[0, 0]:.1f} float32, converted {found[0, 0]} {found.dtype}; inputs {np.dtype(source['dtype'])}")
assert abs(expected[0, 0] - 3) < 1e-5 and found[0, 0] == 75
assert found.dtype == np.int8 and source["dtype"] == np.int8
P
env/bin/python case.py
