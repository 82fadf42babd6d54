#!/bin/sh
# litert-torch 0.10.0, ai-edge-litert 2.3.0. A softmax between a dequantize and a quantize, as in attention whose scores
# and probabilities are rounded, is converted to an int8 SOFTMAX of whatever grid the program has. Only one can run:
# scale 1/256 and zero point -128. With any other, a symmetric one for instance, convert() returns a model without a
# message, and the model cannot be loaded.
# Seen: "1/256, -128: int8 SOFTMAX, runs; 1/128, 0: int8 SOFTMAX, output->params.zero_point != -128".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q litert-torch==0.10.0 ai-edge-litert==2.3.0 torch==2.14.1
cd "$folder"
cat > case.py <<'P'
import litert_torch
import torch
import torch.ao.quantization.fx._decomposed
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
from litert_torch.quantize.quant_config import QuantConfig

ops = torch.ops.quantized_decomposed
STATIC = QuantConfig(pt2e_quantizer=PT2EQuantizer().set_global(get_symmetric_quantization_config()))


def rounded(x, scale, zero=0):
    grid = scale, zero, -128, 127, torch.int8
    return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *grid), *grid)


class Attention(torch.nn.Module):
    def __init__(self, scale, zero):
        super().__init__()
        self.grid = scale, zero

    def forward(self, x):
        return rounded(rounded(x, 0.05).softmax(-1), *self.grid)


def said(scale, zero):
    model, x = Attention(scale, zero).eval(), torch.randn(2, 5, 8)
    litert_torch.convert(model, (x,), quant_config=STATIC).export("model.tflite")
    content = open("model.tflite", "rb").read()
    (graph,) = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0)).subgraphs
    (operator,) = graph.operators
    assert graph.tensors[operator.outputs[0]].type == schema.TensorType.INT8
    try:
        Interpreter(model_content=content).allocate_tensors()
    except RuntimeError as error:
        assert "zero_point != -128" in str(error)
        return "output->params.zero_point != -128"
    return "runs"


found = said(1 / 256, -128), said(1 / 128, 0)
print(f"1/256, -128: int8 SOFTMAX, {found[0]}; 1/128, 0: int8 SOFTMAX, {found[1]}")
assert found == ("runs", "output->params.zero_point != -128")
P
env/bin/python case.py
