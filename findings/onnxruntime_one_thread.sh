#!/bin/sh
# onnxruntime 1.32.0, CPU. With intra_op_num_threads=2 most operators share their work, but DequantizeLinear, Where, Cast, Expand and
# IsNaN do all of it on the thread that calls (Add, Mul, Max, Softmax, Gelu, Transpose, QuantizeLinear and others do not). A file with
# QuantizeLinear and DequantizeLinear, or a mask put in by Where, as exporters write it, therefore gains less than a float file from
# more threads: in a MiniLM of int8, twelve Where took 13 of 66 ms on two threads. A mask that is added is shared.
# Seen: the share of the second thread in the time of Where, Cast, DequantizeLinear, Expand, IsNaN is 0, of the others .3 to .5.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2
cd "$folder"
env/bin/python - <<'P'
import os, threading
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as n

x = np.random.default_rng(0).standard_normal((8, 12, 128, 128)).astype(np.float32)
given = {"x": x, "row": x[:, :1].copy(), "mask": x[:, :1] > 0, "codes": x.astype(np.int8)}
kinds = {"x": T.FLOAT, "row": T.FLOAT, "mask": T.BOOL, "codes": T.INT8}
stored = {"one": np.float32(1), "scale": np.float32(0.05), "zero": np.int8(0), "sizes": np.array(x.shape)}
nodes = {
    "Where": (["mask", "one", "x"], T.FLOAT, {}), "Cast": (["x"], T.INT8, {"to": T.INT8}), "Expand": (["row", "sizes"], T.FLOAT, {}),
    "IsNaN": (["x"], T.BOOL, {}), "DequantizeLinear": (["codes", "scale", "zero"], T.FLOAT, {}),
    "QuantizeLinear": (["x", "scale", "zero"], T.INT8, {}), "Add": (["x", "row"], T.FLOAT, {}), "Max": (["x", "one"], T.FLOAT, {}),
    "Gelu": (["x"], T.FLOAT, {}), "Transpose": (["x"], T.FLOAT, {"perm": [0, 2, 1, 3]}),
}
alone = {"Where", "Cast", "Expand", "IsNaN", "DequantizeLinear"}


def nanoseconds():
    return {thread: int(open(f"/proc/self/task/{thread}/schedstat").read().split()[0]) for thread in os.listdir("/proc/self/task")}


for name, (inputs, kind, attributes) in nodes.items():
    ends = [[h.make_tensor_value_info(i, kinds[i], given[i].shape) for i in inputs if i in given], [h.make_tensor_value_info("y", kind, x.shape if name != "Transpose" else (8, 128, 12, 128))]]
    tensors = [n.from_array(stored[i], i) for i in inputs if i in stored]
    graph = h.make_graph([h.make_node(name, inputs, ["y"], **attributes)], "g", *ends, tensors)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else a thread that waits takes time too
    older = nanoseconds().keys()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    workers = nanoseconds().keys() - older
    feeds = {i: given[i] for i in inputs if i in given}
    session.run(None, feeds)
    before = nanoseconds()
    for _ in range(50):
        session.run(None, feeds)
    spent = {thread: time - before[thread] for thread, time in nanoseconds().items() if thread in before}
    shared = sum(spent[thread] for thread in workers)
    share = shared / (shared + spent[str(threading.get_native_id())])
    print(f"{name}: {share:.2f} of the work on the second thread")
    assert share < 0.02 if name in alone else share > 0.1, (name, share)
P
