#!/bin/sh
# onnxruntime 1.32.0, CPU. After InferenceSession.run has returned, the other threads of the session go on looking for work: with two
# threads that is 25 ms of a core after each call, while Python sleeps. Two models that are timed in turns in one process take each
# other's cores: an int8 ViT-tiny took 81 ms beside its float file, which took 110; 59 and 90 with session.force_spinning_stop, and their
# ratio went from 1.38 to 1.53. The entry ends the search with the call; speed within a call stays.
# Seen: 25 ms of processor time after a call of a product of 512 x 512; 0.1 ms with session.force_spinning_stop.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2
cd "$folder"
env/bin/python - <<'P'
import time
from statistics import median
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto as T, helper as h, numpy_helper as n

w = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
ends = [[h.make_tensor_value_info(name, T.FLOAT, [512, 512])] for name in "xy"]
graph = h.make_graph([h.make_node("MatMul", ["x", "w"], ["y"])], "g", *ends, [n.from_array(w, "w")])
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
spent = {}
for stop in ("0", "1"):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.force_spinning_stop", stop)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    times = []
    for _ in range(10):
        session.run(None, {"x": w})
        start = time.process_time()
        time.sleep(0.2)
        times.append(1e3 * (time.process_time() - start))
    spent[stop] = median(times)
    print(f"session.force_spinning_stop {stop}: {spent[stop]:.1f} ms of processor time in the 200 ms after a call")
assert spent["0"] > 5 and spent["1"] < 1, spent
P
