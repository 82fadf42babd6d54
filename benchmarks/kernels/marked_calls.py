"""Call the C++ kernels between marks: what instruction_counts.py runs in valgrind, without torch.

python marked_calls.py EXTENSION FOLDER ROWS SIZE

FOLDER has the elements of each type. A call of getppid, which nothing else makes, is a mark: one
before and one after each call that counts. Prints a line for each of these.
"""

import ctypes
import os
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

TYPES = {"float32": (0, 4), "bfloat16": (3, 2)}
QMIN, QMAX, SCALE, CANDIDATES, BINS, WIDTH = -128, 127, 0.03, 20, 2048, 0.003
COLUMNS = 7
WHOLE = (1, 1)  # outer, channels


def main(extension: str, folder: str, rows: int, size: int) -> None:
    spec = spec_from_file_location("quanttune._C", extension)
    if spec is None or spec.loader is None:
        raise ImportError(f"{extension} is no extension")
    kernels = module_from_spec(spec)
    spec.loader.exec_module(kernels)
    for name in TYPES:
        elements = ctypes.create_string_buffer((Path(folder) / name).read_bytes())
        for op, call in calls(kernels, name, ctypes.addressof(elements), rows, size).items():
            call()  # tables of positions, and pages that are touched for the first time
            os.getppid()
            call()
            os.getppid()
            print(op, name)


def calls(kernels: Any, name: str, x: int, rows: int, size: int) -> dict[str, Callable[[], None]]:
    """Return every kernel with its arguments, on one thread."""
    number, width = TYPES[name]
    elements = rows * size
    kept = [ctypes.create_string_buffer(elements * width), (ctypes.c_float * 1)(SCALE)]
    kept += [(ctypes.c_float * CANDIDATES)(*(SCALE * i for i in range(1, CANDIDATES + 1)))]
    kept += [(ctypes.c_float * (rows * COLUMNS))(), (ctypes.c_float * rows)(*[1.0] * rows)]
    kept += [(ctypes.c_int64 * BINS)(), (ctypes.c_double * CANDIDATES)()]
    y, scale, scales, statistics, ratio_grad, counts, errors = map(ctypes.addressof, kept)
    of_all = (number, *WHOLE, elements, QMIN, QMAX, 1)
    of_rows = (number, rows, size, False)
    return {
        "fake_quant": lambda: kernels.fake_quant(x, scale, y, *of_all),
        "fake_quant_backward": lambda: kernels.fake_quant_backward(x, x, scale, y, *of_all),
        "dynamic_fake_quant": lambda: kernels.dynamic_fake_quant(x, y, *of_all),
        "outlier_statistics": lambda: kernels.outlier_statistics(x, statistics, *of_rows, 0, 1),
        "outlier_statistics_backward": lambda: kernels.outlier_statistics_backward(
            x, x, statistics, ratio_grad, y, *of_rows, False, 0, 1
        ),
        "quantization_errors": lambda: kernels.quantization_errors(
            x, scales, errors, number, elements, CANDIDATES, QMIN, QMAX, 1
        ),
        "magnitude_histogram": lambda: (
            kernels.magnitude_histogram(x, counts, number, elements, WIDTH, BINS, 1),
            kept,  # buffers live as long as the calls
        )[0],
    }


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:5]))
