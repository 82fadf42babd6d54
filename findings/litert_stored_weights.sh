#!/bin/sh
# litert-torch 0.10.0. A weight as int8 constants behind dequantize_per_channel, which is what torchao's convert_pt2e
# makes by default (fold_quantize), is not converted: "'stablehlo.uniform_dequantize' op operand #0 must be ranked tensor
# of ... quantized ..., but got tensor<8x8xi8>". The same codes as floats behind quantize_per_channel and
# dequantize_per_channel become an int8 weight in the file.
# Seen: "stored codes: ValueError; rounded again: FULLY_CONNECTED of INT8".
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
from ai_edge_litert import schema_py_generated as schema
from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
from litert_torch.quantize.quant_config import QuantConfig

ops = torch.ops.quantized_decomposed
STATIC = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config()))


def rounded(x, scale, zero=0):
    grid = scale, zero, -128, 127, torch.int8
    return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *grid), *grid)


class Linear(torch.nn.Module):
    def __init__(self, stored):
        super().__init__()
        self.stored = stored
        codes = torch.arange(-32, 32, dtype=torch.int8).view(8, 8)
        self.register_buffer("weight", codes if stored else codes * 0.01)
        self.register_buffer("scales", torch.full((8,), 0.01))
        self.register_buffer("zeros", torch.zeros(8, dtype=torch.int64))

    def forward(self, x):
        grid = self.scales, self.zeros, 0, -128, 127, torch.int8
        codes = self.weight if self.stored else ops.quantize_per_channel.default(self.weight, *grid)
        weight = ops.dequantize_per_channel.default(codes, *grid)
        return rounded(torch.nn.functional.linear(rounded(x, 0.05), weight), 0.1)


x = torch.randn(2, 8)
models = Linear(True).eval(), Linear(False).eval()
torch.testing.assert_close(models[0](x), models[1](x))
try:
    litert_torch.convert(models[0], (x,), quant_config=STATIC)
    error = None
except ValueError as raised:
    error = raised
assert error is not None and "uniform_dequantize" in str(error)
litert_torch.convert(models[1], (x,), quant_config=STATIC).export("model.tflite")
content = open("model.tflite", "rb").read()
model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
(operator,) = model.subgraphs[0].operators
kind = model.operatorCodes[operator.opcodeIndex].builtinCode
assert kind == schema.BuiltinOperator.FULLY_CONNECTED
types = {model.subgraphs[0].tensors[index].type for index in operator.inputs[:2]}
assert types == {schema.TensorType.INT8}
print("stored codes: ValueError; rounded again: FULLY_CONNECTED of INT8")
P
env/bin/python case.py
