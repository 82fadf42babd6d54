#!/bin/sh
# torch 2.14.1. torch.export takes a forward(self, **x) and free sizes of what it is called with. Where the code lets two sizes be
# one, as a + b does, the program holds a guard for it that looks its inputs up by a name it does not define: module() of the
# program refuses every call, the example's too, and run_decompositions, so that torch.onnx.export fails as well. With the same
# arguments by name, forward(self, a, b), all of it works.
# Seen: "by name: [2.0, 2.0, 2.0, 2.0, 2.0]", "by **: name 'L' is not defined".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --no-compile torch==2.14.1 numpy
cd "$folder"
env/bin/python - <<'P'
import torch


class ByName(torch.nn.Module):
    def forward(self, a, b):
        return a + b


class ByKeywords(torch.nn.Module):
    def forward(self, **x):
        return x["a"] + x["b"]


def answer(module, shapes):
    ones = {name: torch.ones(3) for name in "ab"}
    program = torch.export.export(module, (), ones, dynamic_shapes=shapes)
    try:
        return program.module()(a=torch.ones(5), b=torch.ones(5)).tolist()
    except NameError as error:
        return str(error)


free = {name: {0: torch.export.Dim.AUTO} for name in "ab"}
named, keywords = answer(ByName(), free), answer(ByKeywords(), {"x": free})
print(f"by name: {named}")
print(f"by **: {keywords}")
assert named == [2.0] * 5, named
assert keywords == "name 'L' is not defined", keywords
P
