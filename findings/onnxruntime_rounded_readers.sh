#!/bin/sh
# onnxruntime 1.32.0. quantize_static with op_types_to_quantize=["MatMul"] rounds what goes into a MatMul for every reader of
# that tensor: one pair of QuantizeLinear and DequantizeLinear stands in front of all of them. In a Transformer that is the
# residual stream: the Add that closes a block reads its rounded copy, though no Add was asked for, and the error of 8 bits
# stays in the stream. OpTypesToExcludeOutputQuantization does not change it. The extra option DedicatedQDQPair, "dedicated
# QDQ pair for each node", does where two products read the tensor (queries and keys), and not where one does (the
# feed-forward part).
# Seen, error of x + x W where W is zero, so that the answer is x; of two products, then of one:
# "two: 0.0219, DedicatedQDQPair 0.0000", "one: 0.0219, DedicatedQDQPair 0.0219".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 sympy
cd "$folder"
env/bin/python - <<'P' 2>/dev/null
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as n
from onnxruntime.quantization import CalibrationDataReader, quantize_static

x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
x[0, 0] = 9

def error(products, **more):
    tensors = [n.from_array(np.zeros((8, 8), np.float32), f"w{i}") for i in range(products)]
    nodes, last = [h.make_node("MatMul", ["x", f"w{i}"], [f"m{i}"]) for i in range(products)], "x"
    for i in range(products):
        nodes.append(h.make_node("Add", [last, f"m{i}"], [f"y{i}"]))
        last = f"y{i}"
    ends = [[h.make_tensor_value_info(name, T.FLOAT, [4, 8])] for name in ("x", last)]
    model = h.make_model(h.make_graph(nodes, "g", *ends, tensors), opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "float.onnx")
    options = {"OpTypesToExcludeOutputQuantization": ["MatMul"], **more}

    class Reader(CalibrationDataReader):
        rows = iter([{"x": x}])
        def get_next(self):
            return next(self.rows, None)

    quantize_static("float.onnx", "q.onnx", Reader(), op_types_to_quantize=["MatMul"], extra_options=options)
    session = ort.InferenceSession("q.onnx", providers=["CPUExecutionProvider"])
    return float(np.abs(session.run(None, {"x": x})[0] - x).max())

found = [(error(products), error(products, DedicatedQDQPair=True)) for products in (2, 1)]
for name, (shared, own) in zip(("two", "one"), found):
    print(f"{name}: {shared:.4f}, DedicatedQDQPair {own:.4f}")
two, one = found
assert two[0] > 0.01 and two[1] < 1e-6 and min(one) > 0.01, found
P
