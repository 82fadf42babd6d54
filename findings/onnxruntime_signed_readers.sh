#!/bin/sh
# onnxruntime 1.32.0, CPU, x86. Where two products read one tensor of int8 codes (QuantizeLinear, DequantizeLinear), as queries and keys
# do, both are computed in float; with uint8 codes, or one reader, in integers. ONNX Runtime makes uint8 of int8 codes only where
# they have one reader. A pair for each reader does not help, for of equal nodes it makes one again, before that. Pairs that are
# equal in all but `axis`, which says nothing beside a scale for the whole tensor, stay two, and both products are integers.
# Seen: "uint8: 2 of 2 products in integers", "int8: 0", "int8, a pair each: 0", "int8, a pair each of another axis: 2".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2
cd "$folder"
env/bin/python - <<'P' 2>/dev/null
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as n

x = np.random.default_rng(0).standard_normal((2, 4, 8), np.float32)
weight = np.random.default_rng(1).integers(-127, 128, (8, 8))

def integers(dtype, pairs=1, axes=(1, 1)):
    zero = np.array(128 if dtype == np.uint8 else 0, dtype)
    tensors = [n.from_array(zero, "z"), n.from_array(np.float32(0.03), "s"), n.from_array(np.full(8, 0.01, np.float32), "ws")]
    nodes = []
    for i in range(pairs):
        nodes.append(h.make_node("QuantizeLinear", ["x", "s", "z"], [f"q{i}"], axis=axes[i]))
        nodes.append(h.make_node("DequantizeLinear", [f"q{i}", "s", "z"], [f"d{i}"]))
    tensors.append(n.from_array(np.full(8, zero, dtype), "wz"))
    for i in range(2):
        tensors.append(n.from_array((np.roll(weight, i, 0) + int(zero)).astype(dtype), f"w{i}"))
        nodes.append(h.make_node("DequantizeLinear", [f"w{i}", "ws", "wz"], [f"wf{i}"], axis=1))
        nodes.append(h.make_node("MatMul", [f"d{min(i, pairs - 1)}", f"wf{i}"], [f"y{i}"]))
    given, *made = (h.make_tensor_value_info(name, T.FLOAT, [2, 4, 8]) for name in ("x", "y0", "y1"))
    model = h.make_model(h.make_graph(nodes, "g", [given], made, tensors), opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rounded = np.clip(np.rint(x / np.float32(0.03)), -128, 127) * 0.03
    assert np.abs(session.run(None, {"x": x})[0] - rounded @ (weight * 0.01)).max() < 1e-3
    return [node.op_type for node in onnx.load("optimized.onnx").graph.node].count("MatMulIntegerToFloat")

found = {
    "uint8": integers(np.uint8), "int8": integers(np.int8), "int8, a pair each": integers(np.int8, 2),
    "int8, a pair each of another axis": integers(np.int8, 2, (1, 2)),
}
for name, count in found.items():
    print(f"{name}: {count} of 2 products in integers")
assert list(found.values()) == [2, 0, 0, 2], found
P
