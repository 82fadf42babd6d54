#!/bin/sh
# openvino 2026.4.1, CPU. A convolution of 8-bit integers, rounded again, whose patches stand beside a class token that
# is expanded to the batch: where the batch is a free dimension, every channel gets the bias of channel 0. No message.
# Vision Transformers are like this. With the token as zeros of the patches plus the token the answer is right.
# Seen, for an image of zeros and biases 1, 2, 3 and 4: "free batch: 1 1 1 1", "batch of 2: 1 2 3 4".
set -eu
export CI=true  # openvino sends usage data otherwise
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q openvino==2026.4.1 onnx==1.23.2
cd "$folder"
env/bin/python - <<'P'
import numpy as np, onnx, openvino
from onnx import TensorProto as T, helper as h, numpy_helper as n

def answer(batch):
    tensors = [n.from_array(np.float32(0.05), "s"), n.from_array(np.uint8(128), "z")]
    tensors += [n.from_array(np.float32(0.01), "ws"), n.from_array(np.int8(0), "wz"), n.from_array(np.ones((4, 3, 2, 2), np.int8), "w")]
    tensors += [n.from_array(np.float32([1, 2, 3, 4]), "b"), n.from_array(np.zeros((1, 1, 4), np.float32), "token")]
    tensors += [n.from_array(np.array(value), name) for name, value in (("flat", [0, 4, -1]), ("first", [0]), ("rest", [1, 4]))]
    nodes = [h.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]), h.make_node("DequantizeLinear", ["xq", "s", "z"], ["xf"])]
    nodes += [h.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"])]
    nodes += [h.make_node("Conv", ["xf", "wf", "b"], ["y"], strides=[2, 2], kernel_shape=[2, 2])]
    nodes += [h.make_node("QuantizeLinear", ["y", "s", "z"], ["yq"]), h.make_node("DequantizeLinear", ["yq", "s", "z"], ["yf"])]
    nodes += [h.make_node("Reshape", ["yf", "flat"], ["columns"]), h.make_node("Transpose", ["columns"], ["patches"], perm=[0, 2, 1])]
    nodes += [h.make_node("Shape", ["x"], ["sizes"]), h.make_node("Gather", ["sizes", "first"], ["rows"])]
    nodes += [h.make_node("Concat", ["rows", "rest"], ["size"], axis=0), h.make_node("Expand", ["token", "size"], ["tokens"])]
    nodes += [h.make_node("Concat", ["tokens", "patches"], ["out"], axis=1)]
    x, out = (h.make_tensor_value_info(name, T.FLOAT, [batch, *sizes]) for name, sizes in (("x", (3, 4, 4)), ("out", (5, 4))))
    model = h.make_model(h.make_graph(nodes, "g", [x], [out], tensors), opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "model.onnx")
    compiled = openvino.Core().compile_model("model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([np.zeros((2, 3, 4, 4), np.float32)])[0][0, 1].round().astype(int).tolist()

free, fixed = answer("n"), answer(2)
print("free batch:", *free); print("batch of 2:", *fixed)
assert (free, fixed) == ([1, 1, 1, 1], [1, 2, 3, 4])
P
