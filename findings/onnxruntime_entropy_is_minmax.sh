#!/bin/sh
# onnxruntime 1.32.0. quantize_static with CalibrationMethod.Entropy is to choose the range that loses the least information.
# It looks at ranges from 128 bins of a histogram up to all of them, and the histogram has 128 bins: there is one candidate,
# the whole range. (Only where a later batch is wider than the first are bins added, and with them candidates.) So it gives
# the ranges of MinMax, after more work, and quantize_static has no option for the number of bins. Called by itself with 2048
# bins, the same calibrator clips.
# Seen, range of 4096 normal values and one 60: "MinMax: -3.9 60.0", "Entropy: -3.9 60.0",
# "Entropy, 2048 bins: -3.9 4.2".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q onnxruntime==1.32.0 onnx==1.23.2 sympy
cd "$folder"
env/bin/python - <<'P' 2>/dev/null
import contextlib, io
import numpy as np, onnx
from onnx import TensorProto as T, helper as h
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator

x = np.random.default_rng(0).normal(size=(1, 4097)).astype(np.float32)
x[0, 0] = 60
ends = [[h.make_tensor_value_info(name, T.FLOAT, [1, 4097])] for name in "xy"]
model = h.make_model(h.make_graph([h.make_node("Relu", ["x"], ["y"])], "g", *ends), opset_imports=[h.make_opsetid("", 20)], ir_version=10)
onnx.checker.check_model(model)
onnx.save(model, "float.onnx")

class Reader(CalibrationDataReader):
    def __init__(self):
        self.rows = iter([{"x": x}])
    def get_next(self):
        return next(self.rows, None)

def limits(method, **more):
    with contextlib.redirect_stdout(io.StringIO()):
        calibrator = create_calibrator("float.onnx", None, calibrate_method=method, extra_options=more)
        calibrator.collect_data(Reader())
        found = calibrator.compute_data()["x"].range_value
    return [round(float(np.asarray(end).item()), 1) for end in found]

minmax, entropy = limits(CalibrationMethod.MinMax), limits(CalibrationMethod.Entropy)
more = limits(CalibrationMethod.Entropy, num_bins=2048)
print("MinMax:", *minmax); print("Entropy:", *entropy); print("Entropy, 2048 bins:", *more)
assert minmax == entropy == [-3.9, 60.0] and more == [-3.9, 4.2], (minmax, entropy, more)
P
