#!/bin/sh
# executorch 1.5.1, XNNPACK. gelu(x, approximate="tanh"), which GPT-2, Gemma and SigLIP use, is delegated as the exact
# GELU: the argument is lost, without a message. The float model's answers move by up to 4.7e-4 per layer, a thousand
# times what rounding in float32 does; ExecuTorch's portable operator, without the delegate, keeps the argument.
# Seen: "portable: 2e-07 from tanh; XNNPACK: 5e-04 from tanh, 5e-07 from exact".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile executorch==1.5.1 torch==2.14.1
cd "$folder"
cat > case.py <<'P'
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch.nn import functional as F

x = torch.linspace(-4, 4, 1001).view(1, -1)


def answer(partitioners):
    program = torch.export.export(torch.nn.GELU(approximate="tanh"), (x,))
    lowered = to_edge_transform_and_lower(program, partitioner=partitioners).to_executorch()
    loaded = Runtime.get().load_program(lowered.buffer)
    return loaded.load_method("forward").execute([x])[0].clone()


def apart(one, other):
    return (one - other).abs().max().item()


tanh, exact = F.gelu(x, approximate="tanh"), F.gelu(x)
portable, delegate = answer([]), answer([XnnpackPartitioner()])
print(f"portable: {apart(portable, tanh):.0e} from tanh; XNNPACK: {apart(delegate, tanh):.0e} from tanh, {apart(delegate, exact):.0e} from exact")
assert apart(portable, tanh) < 2e-6 and apart(delegate, exact) < 2e-6 and apart(delegate, tanh) > 4e-4
P
env/bin/python case.py
