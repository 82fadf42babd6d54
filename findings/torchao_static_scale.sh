#!/bin/sh
# torchao 0.18.0, Int8StaticActivationInt8WeightConfig (version 2), a constant scale per tensor for the inputs of a Linear: the scale must
# have as many dimensions as each input that comes, else an AssertionError without words. (1, 1) serves rows alone, (1, 1, 1) tokens
# of sequences alone, and () or (1,) nothing, so that one module cannot be given both. quantize_() itself takes any of them.
# Seen: "() 2-D: AssertionError", "() 3-D: AssertionError", "(1,) 2-D: AssertionError", "(1,) 3-D: AssertionError", "(1, 1) 2-D: runs",
# "(1, 1) 3-D: AssertionError", "(1, 1, 1) 2-D: AssertionError", "(1, 1, 1) 3-D: runs".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile torchao==0.18.0 torch==2.14.1 numpy
cd "$folder"
env/bin/python - <<'P'
import torch, torchao
from torch import nn
from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor, quantize_

print("torchao", torchao.__version__, "torch", torch.__version__)
torch.manual_seed(0)
tokens = torch.randn(2, 5, 16)
scale = tokens.abs().max() / 127
found = {}
for shape in ((), (1,), (1, 1), (1, 1, 1)):
    for x in (tokens[:, 0], tokens):
        model = nn.Sequential(nn.Linear(16, 8)).eval()
        config = Int8StaticActivationInt8WeightConfig(
            act_quant_scale=scale.reshape(shape), granularity=[PerTensor(), PerRow()], version=2
        )
        quantize_(model, config)
        try:
            y = model(x)
            assert y.shape == (*x.shape[:-1], 8)
            outcome = "runs"
        except AssertionError as error:
            outcome = f"AssertionError{error}"
        found[shape, x.dim()] = outcome
        print(f"{shape} {x.dim()}-D: {outcome}")
assert [key for key, outcome in found.items() if outcome == "runs"] == [((1, 1), 2), ((1, 1, 1), 3)]
P
