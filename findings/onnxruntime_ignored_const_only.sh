#!/bin/sh
# onnxruntime 1.32.0. quantize_static's documentation says of the extra option MatMulConstBOnly: "If enabled, only MatMul
# with const B will be quantized". In the default format (QDQ) it is without effect, and without a message: a product of two
# activations (attention has two of them per layer) is rounded all the same. In the format QOperator it works.
# nodes_to_exclude with the names of these products does what the option says.
# Seen, products of two activations that are rounded: "QDQ: 1", "QOperator: 0", "QDQ, nodes_to_exclude: 0".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 sympy
cd "$folder"
env/bin/python - <<'P' 2>/dev/null
import numpy as np, onnx
from onnx import TensorProto as T, helper as h, numpy_helper as n
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

weight = n.from_array(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32), "w")
nodes = [h.make_node("MatMul", ["x", "w"], ["keys"], name="linear")]
nodes += [h.make_node("Transpose", ["x"], ["turned"], perm=[0, 2, 1]), h.make_node("MatMul", ["keys", "turned"], ["scores"], name="attention")]
ends = [[h.make_tensor_value_info(name, T.FLOAT, [1, 4, last])] for name, last in (("x", 8), ("scores", 4))]
model = h.make_model(h.make_graph(nodes, "g", *ends, [weight]), opset_imports=[h.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, "float.onnx")

class Reader(CalibrationDataReader):
    def __init__(self):
        self.rows = iter([{"x": np.random.default_rng(i).normal(size=(1, 4, 8)).astype(np.float32)} for i in range(4)])
    def get_next(self):
        return next(self.rows, None)

def rounded(form, **options):
    quantize_static("float.onnx", "q.onnx", Reader(), quant_format=form, op_types_to_quantize=["MatMul"], extra_options={"MatMulConstBOnly": True}, **options)
    graph = onnx.load("q.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    (product,) = [node for node in graph.node if node.name.startswith("attention")]
    return int(product.op_type != "MatMul" or all(makers[name].op_type == "DequantizeLinear" for name in product.input))

found = rounded(QuantFormat.QDQ), rounded(QuantFormat.QOperator), rounded(QuantFormat.QDQ, nodes_to_exclude=["attention"])
print("QDQ:", found[0]); print("QOperator:", found[1]); print("QDQ, nodes_to_exclude:", found[2])
assert found == (1, 0, 0), found
P
