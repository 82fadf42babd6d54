#!/bin/sh
# onnxruntime 1.32.0. A float bias of a convolution or a Gemm between DequantizeLinear and QuantizeLinear is rounded to whole
# multiples of the product of both operands' scales, however fine the output's scale is, and also where a Clip in front of
# the QuantizeLinear keeps the operator from running in integers. Few bits mean large scales: then biases are lost. The
# basic level of optimization does it; the file says otherwise.
# Seen, for operands' scales of 0.5, an output's of 0.01 and a bias of 0.1: "as written: 0.1 0.1", "basic level: 0.0 0.0"
# (Conv, Gemm).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2
"$folder/env/bin/python" - <<'P'
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as n

def answer(kind, level):
    ones = (1, 1) if kind == "Gemm" else (1, 1, 1, 1)
    tensors = [n.from_array(np.float32(0.5), "s"), n.from_array(np.int8(0), "z")]
    tensors += [n.from_array(np.ones(ones, np.int8), "w"), n.from_array(np.float32([0.1]), "b"), n.from_array(np.float32(0.01), "fine")]
    nodes = [h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), h.make_node("DequantizeLinear", ["q", "s", "z"], ["f"])]
    nodes += [h.make_node("DequantizeLinear", ["w", "s", "z"], ["wf"]), h.make_node(kind, ["f", "wf", "b"], ["c"])]
    nodes += [h.make_node("QuantizeLinear", ["c", "fine", "z"], ["cq"]), h.make_node("DequantizeLinear", ["cq", "fine", "z"], ["y"])]
    ends = [[h.make_tensor_value_info(name, T.FLOAT, ones)] for name in ("x", "y")]
    model = h.make_model(h.make_graph(nodes, "g", *ends, tensors), opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return round(session.run(None, {"x": np.zeros(ones, np.float32)})[0].item(), 4)

levels = ort.GraphOptimizationLevel
written, basic = ([answer(kind, level) for kind in ("Conv", "Gemm")] for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC))
print("as written:", *written); print("basic level:", *basic)
assert (written, basic) == ([0.1, 0.1], [0.0, 0.0])
P
