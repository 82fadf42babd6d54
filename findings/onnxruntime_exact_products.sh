#!/bin/sh
# onnxruntime 1.32.0, x86 processors without VNNI. The session option that makes products of 8 bits exact,
# session.x64quantprecision=1, ends the making of a session where two products read one weight:
# "Attempt to replace the existing tensor". Without the option the file runs, and its products may saturate.
# Seen: "one reader: runs", "two readers: Attempt to replace the existing tensor".
# Elsewhere (processors with VNNI, or not x86) the option has no effect; then this says so and ends with 0.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! grep -qw avx2 /proc/cpuinfo || grep -q vnni /proc/cpuinfo; then echo "not to be seen on this processor"; exit 0; fi
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2
"$folder/env/bin/python" - <<'P'
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as n

def session(readers):
    rng = np.random.default_rng(0)
    tensors = [n.from_array(np.float32(0.02), "s"), n.from_array(np.uint8(128), "z")]
    tensors += [n.from_array(rng.integers(-127, 128, (64, 64)).astype(np.int8), "w")]
    nodes, last = [h.make_node("DequantizeLinear", ["w", "s"], ["wf"])], "x"
    for i in range(readers):
        nodes += [h.make_node("QuantizeLinear", [last, "s", "z"], [f"q{i}"])]
        nodes += [h.make_node("DequantizeLinear", [f"q{i}", "s", "z"], [f"d{i}"])]
        nodes += [h.make_node("MatMul", [f"d{i}", "wf"], [f"y{i}"])]
        last = f"y{i}"
    shape = ["n", 64]
    ends = [[h.make_tensor_value_info(name, T.FLOAT, shape)] for name in ("x", last)]
    model = h.make_model(h.make_graph(nodes, "g", *ends, tensors), opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return "Attempt to replace the existing tensor" if "Attempt to replace" in str(error) else str(error)
    return "runs"

found = session(1), session(2)
print("one reader:", found[0]); print("two readers:", found[1])
assert found == ("runs", "Attempt to replace the existing tensor"), found
P
