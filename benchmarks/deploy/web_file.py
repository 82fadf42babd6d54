"""An ONNX file in onnxruntime-web, as a browser runs it: WebAssembly, here under Node."""

import json
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

SCRIPT = Path(__file__).with_name("web.mjs")


def answers(path: Path, inputs: dict[str, Tensor], modules: Path) -> tuple[Tensor, str]:
    """Return the first output of a file, and the version that computed it.

    Args:
        modules: the folder in which `npm install onnxruntime-web` was called.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        given = []
        for key, x in inputs.items():
            x.numpy().tofile(folder / key)
            kind = str(x.dtype).removeprefix("torch.")
            given += [{"name": key, "type": kind, "dims": [*x.shape], "file": str(folder / key)}]
        job = {"modules": str(modules.resolve()), "model": str(path.resolve()), "inputs": given}
        (folder / "job.json").write_text(json.dumps({**job, "out": str(folder / "out")}))
        command = ["node", str(SCRIPT), str(folder / "job.json")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said = json.loads(done.stdout.splitlines()[-1])
        values = np.fromfile(folder / "out", np.float32).reshape(said["dims"])
    return torch.from_numpy(values), said["version"]
