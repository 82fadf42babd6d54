#!/bin/sh
# executorch 1.5.1, XNNPACK. A Linear of int8 weights and statically rounded inputs is delegated only where its output is
# rounded as well, or rounded behind relu or hardtanh. With a float output, or with torch.clamp between (the same function
# as hardtanh), the partitioner leaves it without a message, and it becomes ExecuTorch's portable loops, which
# dequantize the whole weight in each call: several times slower than the same Linear in float. to_executorch says only
# "Missing out variants: {'quantized_decomposed::dequantize_per_channel'}" unless executorch.kernels.quantized is imported.
# Seen: "rounded: delegated, hardtanh: delegated, clamp: left, float output: left"; of 512 x 512 and 64 rows, on an AMD
# EPYC, "float output 4 times slower than in float".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile executorch==1.5.1 torch==2.14.1
cd "$folder"
cat > case.py <<'P'
import time

import executorch.kernels.quantized
import torch
import torch.ao.quantization.fx._decomposed
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch.nn import functional as F

ops = torch.ops.quantized_decomposed
GRID = 0.05, 0, -128, 127, torch.int8


def rounded(x):
    return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *GRID), *GRID)


class Linear(torch.nn.Module):
    def __init__(self, behind):
        super().__init__()
        self.behind = behind
        self.register_buffer("codes", torch.randint(-127, 128, (512, 512), dtype=torch.int8))
        self.register_buffer("scales", torch.full((512,), 0.001))
        self.register_buffer("zeros", torch.zeros(512, dtype=torch.int64))

    def forward(self, x):
        weight = ops.dequantize_per_channel.default(
            self.codes, self.scales, self.zeros, 0, -128, 127, torch.int8
        )
        return self.behind(F.linear(rounded(x), weight))


def lowered(model):
    program = torch.export.export(model.eval(), (x,))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    left = any(name in str(node.target) for node in edge.exported_program().graph.nodes for name in ("addmm", "aten.mm", "linear"))
    return left, edge.to_executorch()


def seconds(program):
    loaded = Runtime.get().load_program(program.buffer)
    method, best = loaded.load_method("forward"), float("inf")
    for _ in range(20):
        start = time.perf_counter()
        method.execute([x])
        best = min(best, time.perf_counter() - start)
    return best


x = torch.randn(64, 512)
cases = {
    "rounded": rounded,
    "hardtanh": lambda y: rounded(F.hardtanh(y, -3.0, 3.0)),
    "clamp": lambda y: rounded(y.clamp(-3.0, 3.0)),
    "float output": lambda y: y,
}
found = {name: lowered(Linear(behind)) for name, behind in cases.items()}
said = ", ".join(f"{name}: {'left' if left else 'delegated'}" for name, (left, _) in found.items())
left, of_floats = lowered(torch.nn.Linear(512, 512))
slower = seconds(found["float output"][1]) / seconds(of_floats)
print(f"{said}; float output {slower:.0f} times slower than in float")
assert [left for left, _ in found.values()] == [False, False, True, True] and not left
assert slower > 1.5
P
env/bin/python case.py
