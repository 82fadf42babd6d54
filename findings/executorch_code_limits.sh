#!/bin/sh
# executorch 1.5.1, XNNPACK. quantize_per_tensor with quant_min and quant_max of 6 bits keeps codes between them; so does
# the program that is exported, and ExecuTorch's own operator. The XNNPACK delegate takes the node and clips to int8, at
# -128 and 127, without a message: values beyond the grid stay larger than the program says. A hardtanh in front, to the
# ends of the grid, gives the program's answer.
# Seen, for 3.0 at scale .05 and codes from -32 to 31: "program 1.55, delegate 3.00, with hardtanh 1.55".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile executorch==1.5.1 torch==2.14.1
cd "$folder"
cat > case.py <<'P'
import torch
import torch.ao.quantization.fx._decomposed
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch.nn import functional as F

ops = torch.ops.quantized_decomposed
GRID = 0.05, 0, -32, 31, torch.int8


class Rounded(torch.nn.Module):
    def __init__(self, clamped):
        super().__init__()
        self.clamped = clamped

    def forward(self, x):
        x = F.hardtanh(x, -1.6, 1.55) if self.clamped else x
        return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *GRID), *GRID)


def answers(clamped):
    x = torch.tensor([[3.0, 0.5]])
    program = torch.export.export(Rounded(clamped), (x,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    loaded = Runtime.get().load_program(lowered.buffer)
    return program.module()(x), loaded.load_method("forward").execute([x])[0]


program, delegate = answers(False)
clamped = answers(True)[1]
print(f"program {program[0, 0]:.2f}, delegate {delegate[0, 0]:.2f}, with hardtanh {clamped[0, 0]:.2f}")
assert abs(program[0, 0] - 1.55) < 1e-5 and abs(clamped[0, 0] - 1.55) < 1e-5
assert abs(delegate[0, 0] - 3.0) < 1e-5
P
env/bin/python case.py
