#!/bin/sh
# onnx 1.23.2, numpy 2.4.0. The reference evaluator refuses GatherElements where the axis of the data has 64 elements or more
# (numpy.choose takes no more) and more than one is gathered, and where another dimension of the indices is shorter than
# that of the data. The operator's description allows both, the checker passes them, and onnxruntime 1.32.0 runs them.
# torch.onnx folds constants by this evaluator: the segments of every BERT, the first of 512, are such a node; it stays in
# the file, and "Evaluation failed: cannot reshape array of size 1 into shape (1,24)" is logged.
# Seen: "512 gathered at 24: ValueError", "63 gathered at 24: equal", "2 x 8 gathered at 1 x 8: ValueError".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.0
"$folder/env/bin/python" - <<'P'
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h
from onnx.reference import ReferenceEvaluator

def outcome(data, indices):
    shapes = (("data", data.shape), ("indices", indices.shape), ("y", indices.shape))
    *inputs, output = [h.make_tensor_value_info(name, T.INT64, shape) for name, shape in shapes]
    node = h.make_node("GatherElements", ["data", "indices"], ["y"], axis=1)
    graph = h.make_graph([node], "g", inputs, [output])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    feed = {"data": data, "indices": indices}
    expected = np.take_along_axis(data[: len(indices)], indices, 1)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, feed)[0], expected)
    try:
        return "equal" if np.array_equal(ReferenceEvaluator(model).run(None, feed)[0], expected) else "other"
    except ValueError as error:
        return type(error).__name__

def row(length):
    return np.arange(length)[None] * 3

seen = (
    outcome(row(512), np.arange(24)[None]),
    outcome(row(63), np.arange(24)[None]),
    outcome(np.arange(16).reshape(2, 8), np.arange(8)[None]),
)
print("512 gathered at 24: %s, 63 gathered at 24: %s, 2 x 8 gathered at 1 x 8: %s" % seen)
assert seen == ("ValueError", "equal", "ValueError")
P
