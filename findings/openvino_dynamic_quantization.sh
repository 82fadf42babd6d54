#!/bin/sh
# openvino 2026.4.1, CPU with VNNI. Two quantized tensors whose weights are uint8 codes of zero point 128 are multiplied as floats,
# and the activation, which is rounded already, is rounded once more, each 32 values by a range of their own: what is meant for
# models whose weights alone are compressed. INFERENCE_PRECISION_HINT f32 does not turn that off; EXECUTION_MODE_HINT ACCURACY does.
# Weights that are int8 codes of zero point 0 make a product of integers, and exact. No message tells one from the other.
# Seen, the mean difference to float64: "uint8: f32 0.0025, ACCURACY 0.0000", "int8: f32 0.0000, ACCURACY 0.0000".
set -eu
export CI=true  # openvino sends usage data otherwise
grep -qE 'avx512_vnni|avx_vnni' /proc/cpuinfo || { echo "needs a processor with VNNI"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q openvino==2026.4.1 onnx==1.23.2
cd "$folder"
env/bin/python - <<'P'
import numpy as np, onnx, openvino
from onnx import TensorProto as T, helper as h, numpy_helper as n

generator = np.random.default_rng(0)
x = generator.standard_normal((4, 64), np.float32)
weight = generator.integers(-127, 128, (64, 64))

def differences(zero):
    tensors = [n.from_array(np.float32(0.03), "s"), n.from_array(np.uint8(128), "z"), n.from_array(np.float32(0.001), "ws")]
    tensors += [n.from_array((weight + int(zero)).astype(zero.dtype), "w"), n.from_array(zero, "wz")]
    nodes = [h.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]), h.make_node("DequantizeLinear", ["xq", "s", "z"], ["xf"])]
    nodes += [h.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"]), h.make_node("MatMul", ["xf", "wf"], ["y"])]
    given, made = (h.make_tensor_value_info(name, T.FLOAT, ["n", size]) for name, size in (("x", 64), ("y", 64)))
    model = h.make_model(h.make_graph(nodes, "g", [given], [made], tensors), opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "model.onnx")
    rounded = np.clip(np.rint(x.astype(np.float64) / np.float32(0.03)), -128, 127) * 0.03
    exact = rounded @ weight.astype(np.float64) * 0.001
    for hints in ({"INFERENCE_PRECISION_HINT": "f32"}, {"EXECUTION_MODE_HINT": "ACCURACY"}):
        yield np.abs(openvino.Core().compile_model("model.onnx", "CPU", hints)([x])[0] - exact).mean()

found = {kind: tuple(differences(zero)) for kind, zero in (("uint8", np.uint8(128)), ("int8", np.int8(0)))}
for kind, (f32, accurate) in found.items():
    print(f"{kind}: f32 {f32:.4f}, ACCURACY {accurate:.4f}")
assert found["uint8"][0] > 1e-3 and max(*found["int8"], found["uint8"][1]) < 1e-5
P
