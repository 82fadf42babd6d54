"""An ONNX model that ONNX Runtime computes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .past import IDS, has_past

if TYPE_CHECKING:
    import onnx

CPUINFO = Path("/proc/cpuinfo")  # of Linux


def has_vnni() -> bool | None:
    """Tell whether the processor adds products of 8 bits in 32; None if it is none of x86."""
    flags = CPUINFO.read_text() if CPUINFO.exists() else ""
    return "vnni" in flags if "sse2" in flags else None


def read(path: str | Path) -> "onnx.ModelProto":
    """Read an ONNX file and the tensors beside it.

    Raises:
        FileNotFoundError: there is none. ValueError: it is not whole, or no ONNX file.
        ModuleNotFoundError: the extra deploy is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "quanttune[deploy]"') from error
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        model = onnx.load(path)
    except (DecodeError, ValueError, OSError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{path} is no whole ONNX file: {error}") from error
    if not model.graph.node or not model.opset_import:
        raise ValueError(f"{path} is no whole ONNX file: it holds no graph, or not all of it")
    return model


class OnnxModel:
    """Run a model of ONNX in ONNX Runtime on the CPU, called as the model that it was made from.

    Args:
        model: a file, or what `read` returned.
        threads: of one operator.
        optimized: a file for the graph that ONNX Runtime makes of it.

    Raises:
        ValueError: ONNX Runtime refuses the model.
    """

    def __init__(self, model: Any, *, threads: int = 1, optimized: Path | None = None) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as states

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # its threads else look for work after a call, on cores that the next model of a turn needs
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if optimized:
            options.optimized_model_filepath = str(optimized)
        is_file = isinstance(model, (str, Path))
        source = str(model) if is_file else model.SerializeToString()
        # they have no class in common
        kinds = [kind for kind in vars(states).values() if isinstance(kind, type)]
        self._refusals = tuple(kind for kind in kinds if issubclass(kind, Exception))
        try:
            self._session = onnxruntime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"]
            )
        except self._refusals as error:
            if is_file:
                read(model)  # says what is wrong with the file
            raise ValueError(f"ONNX Runtime refuses the model: {error}") from error
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self._pasts = {v.name: v.shape for v in self._session.get_inputs() if has_past([v.name])}
        self.outputs = tuple(value.name for value in self._session.get_outputs())

    def __call__(self, *args: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """Return the outputs by name, in their order.

        Arguments go to the inputs in their order, keywords to those of their names; keywords that
        the model has no input for, such as labels, are left out. Where keys and values of earlier
        tokens are not given, there are none.

        Raises:
            ValueError: an input is missing, or does not fit.
        """
        given = {**dict(zip(self.inputs, args, strict=False)), **kwargs}
        for name, (_, heads, _, channels) in self._pasts.items():
            given.setdefault(name, torch.zeros(len(given.get(IDS, ())), heads, 0, channels))
        if missing := [name for name in self.inputs if name not in given]:
            raise ValueError(f"the model needs the inputs {missing}, got {list(given)}")
        feeds = {name: given[name].detach().cpu().numpy() for name in self.inputs}
        try:
            values = self._session.run(None, feeds)
        except self._refusals as error:
            raise ValueError(f"ONNX Runtime refuses the inputs: {error}") from error
        return {n: torch.from_numpy(value) for n, value in zip(self.outputs, values, strict=True)}
