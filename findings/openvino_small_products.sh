#!/bin/sh
# openvino 2026.4.1, CPU, EXECUTION_MODE_HINT ACCURACY. Two Linear layers of int8 without biases, with something rounded between them,
# weights scaled per channel, at most 256 wide, of a fixed batch: OpenVINO makes one operator (Subgraph) of them, and answers are
# wrong by factors of a million. With one scale for all channels, a bias, 257 channels in the middle, a free batch, or the option
# SNIPPETS_MODE DISABLE they are right. Nothing is said.
# Seen, the largest difference to float64, answers being of size 1 to 7: "as it is: 9e+08", "one scale: 6e-08", "biases: 9e-08",
# "257 wide: 9e-08", "free batch: 5e-08", "SNIPPETS_MODE DISABLE: 5e-08".
set -eu
export CI=true  # openvino sends usage data otherwise
grep -qE 'avx512_vnni' /proc/cpuinfo || { echo "seen on a processor with AVX-512 VNNI only"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q openvino==2026.4.1 onnx==1.23.2
cd "$folder"
env/bin/python - <<'P'
import numpy as np, onnx, openvino
from onnx import TensorProto as T, helper as h, numpy_helper as n

SCALES = {"a": np.float32(0.03), "b": np.float32(0.008)}

def difference(options={}, wide=24, per_channel=True, bias=False, batch=4):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((4, 24), np.float32)
    tensors = [n.from_array(np.int8(0), "z"), *(n.from_array(value, name) for name, value in SCALES.items())]
    nodes, last, exact = [], "x", x.astype(np.float64)

    def add(kind, *inputs, **attributes):
        nodes.append(h.make_node(kind, inputs, [f"v{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    for scale, (inputs, outputs) in zip("ab", ((24, wide), (wide, 5))):
        weight = generator.integers(-127, 128, (inputs, outputs)).astype(np.int8)
        steps = generator.uniform(0.002, 0.004, outputs).astype(np.float32)
        steps = steps if per_channel else np.full_like(steps, 0.003)
        shift = generator.standard_normal(outputs).astype(np.float32)
        stored = {"w": weight, "s": steps, "z": np.zeros(outputs, np.int8), "b": shift}
        tensors += [n.from_array(value, f"{name}_{scale}") for name, value in stored.items()]
        last = add("DequantizeLinear", add("QuantizeLinear", last, scale, "z"), scale, "z")
        last = add("MatMul", last, add("DequantizeLinear", f"w_{scale}", f"s_{scale}", f"z_{scale}", axis=1))
        exact = np.clip(np.rint(exact.astype(np.float32) / SCALES[scale]), -128, 127) * np.float64(SCALES[scale])
        exact = exact @ (weight * steps.astype(np.float64))
        if bias:
            last, exact = add("Add", last, f"b_{scale}"), exact + shift
        if scale == "a":
            last, exact = add("Relu", last), np.maximum(exact, 0)
    nodes[-1].output[0] = "y"
    given, made = (h.make_tensor_value_info(name, T.FLOAT, [batch, size]) for name, size in (("x", 24), ("y", 5)))
    model = h.make_model(h.make_graph(nodes, "g", [given], [made], tensors), opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "model.onnx")
    compiled = openvino.Core().compile_model("model.onnx", "CPU", {"EXECUTION_MODE_HINT": "ACCURACY", **options})
    return np.abs(compiled([x])[0] - exact).max()

found = {
    "as it is": difference(), "one scale": difference(per_channel=False), "biases": difference(bias=True),
    "257 wide": difference(wide=257), "free batch": difference(batch="n"),
    "SNIPPETS_MODE DISABLE": difference({"SNIPPETS_MODE": "DISABLE"}),
}
for name, value in found.items():
    print(f"{name}: {value:.0e}")
wrong = found.pop("as it is")
assert wrong > 1e3 and max(found.values()) < 1e-4
P
