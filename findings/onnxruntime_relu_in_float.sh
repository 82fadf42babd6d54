#!/bin/sh
# onnxruntime 1.32.0. A MatMul of two rounded operands (DequantizeLinear on both) becomes a product of integers, MatMulIntegerToFloat,
# whatever reads it: a sum, a Gelu, a QuantizeLinear. Where a Relu reads it and its result is rounded (to codes whose zero point is
# in the middle, so that the rounding cannot stand for the Relu), the MatMul stays one of floats, behind two DequantizeLinear, without
# a message. So the first product of a feed-forward part without a bias, such as T5's, is computed in float. max(x, 0) is the same
# function, and leaves it an integer one.
# Seen: "Relu: MatMul", "Max: MatMulIntegerToFloat", equal answers.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2
cd "$folder"
env/bin/python - <<'P'
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as n

rng = np.random.default_rng(0)
weights = [rng.integers(0, 256, (16, 16), np.uint8) for _ in range(2)]
tensors = [n.from_array(np.float32(0.05), "scale"), n.from_array(np.uint8(128), "middle"), n.from_array(np.float32(0), "zero"), n.from_array(np.float32(0.3137), "coarse")]
tensors += [n.from_array(w, f"w{i}") for i, w in enumerate(weights)]
x = rng.standard_normal((3, 4, 16)).astype(np.float32)
found, answers = {}, []
for name in ("Relu", "Max"):
    def rounded(value, to, scale):
        return [h.make_node("QuantizeLinear", [value, scale, "middle"], [f"{to}_codes"]),
                h.make_node("DequantizeLinear", [f"{to}_codes", scale, "middle"], [to])]
    nodes = [h.make_node("DequantizeLinear", [f"w{i}", "scale", "middle"], [f"float_w{i}"]) for i in range(2)]
    nodes += [*rounded("x", "a", "scale"), h.make_node("MatMul", ["a", "float_w0"], ["b"], name="first")]
    nodes += [h.make_node(name, ["b"] + ["zero"] * (name == "Max"), ["c"])]
    nodes += [*rounded("c", "d", "coarse"), h.make_node("MatMul", ["d", "float_w1"], ["y"], name="second")]
    ends = [[h.make_tensor_value_info(value, T.FLOAT, ["rows", "tokens", 16])] for value in ("x", "y")]
    model = h.make_model(h.make_graph(nodes, "g", *ends, tensors), opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = "optimized.onnx", 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answers += session.run(None, {"x": x})
    kinds = [node.op_type for node in onnx.load("optimized.onnx").graph.node if "MatMul" in node.op_type]
    found[name] = kinds
    print(f"{name}: {kinds[0]}; the second product: {kinds[1]}")
assert found == {"Relu": ["MatMul", "MatMulIntegerToFloat"], "Max": ["MatMulIntegerToFloat"] * 2}, found
np.testing.assert_allclose(*answers, rtol=1e-5, atol=1e-5)
P
