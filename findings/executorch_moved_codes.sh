#!/bin/sh
# executorch 1.5.1, XNNPACK. Between a dequantize and a quantize of another scale stands one operation that only moves
# values: permute or view. torch.export, the lowering and to_executorch take it without a message; loading the
# program fails, with "Failed to load method forward, error: 0x:1". XNNPACK wants equal scales there. For slices the
# partitioner looks, and leaves them; with a second move between it computes in float, and is right.
# Transformers whose outputs and operands are both rounded, with scales of their own, are like this.
# Seen: "permute fails, view fails, slice runs, view and permute runs".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q executorch==1.5.1 torch==2.14.1
cd "$folder"
cat > case.py <<'P'
import torch
import torch.ao.quantization.fx._decomposed
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

ops = torch.ops.quantized_decomposed
MOVES = {
    "permute": lambda x: x.permute(0, 2, 1),
    "view": lambda x: x.view(6, 4),
    "slice": lambda x: x[:, 1:],
    "view and permute": lambda x: x.view(6, 4).permute(1, 0),
}


def rounded(x, scale):
    grid = scale, 0, -128, 127, torch.int8
    return ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *grid), *grid)


class Moved(torch.nn.Module):
    def __init__(self, move):
        super().__init__()
        self.move = move

    def forward(self, x):
        return rounded(self.move(rounded(x, 0.05)), 0.02)


def runs(move):
    x = torch.randn(2, 3, 4)
    program = torch.export.export(Moved(move), (x,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    loaded = Runtime.get().load_program(lowered.buffer)
    try:
        method = loaded.load_method("forward")
    except RuntimeError as error:
        assert "Failed to load method" in str(error)
        return False
    torch.testing.assert_close(method.execute([x])[0], program.module()(x), atol=0.021, rtol=0)
    return True


found = {name: runs(move) for name, move in MOVES.items()}
print(", ".join(f"{name} {'runs' if well else 'fails'}" for name, well in found.items()))
assert list(found.values()) == [False, False, True, True]
P
env/bin/python case.py 2>case.log || { cat case.log; exit 1; }
