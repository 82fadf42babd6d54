"""An ONNX file, and the tensors beside one that is too large: replaced together or not at all."""

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import replacing, sync

LARGEST = 2**31 - 2**20  # bytes of tensors in a file; protobuf allows 2 GiB of everything


def write(model: Any, path: Path) -> None:
    """Write a graph of onnx_ir, large tensors beside it.

    The tensors' file is named after its content, so that it is never written over those of the
    older graph, which takes its leave in one step and its tensors only then.
    """
    import onnx_ir as ir

    tensors = [value.const_value for value in model.graph.initializers.values()]
    is_large = sum(tensor.nbytes for tensor in tensors) > LARGEST
    beside = path.with_name(f"{path.name}.{_digest(tensors)}.data") if is_large else None
    doubtful = {*tensor_files(path), *([beside] if beside else [])}
    try:
        with replacing(path) as partial:
            ir.save(model, partial, external_data=beside and beside.name)
            if beside:
                sync(beside)
    finally:
        for unread in doubtful - set(tensor_files(path)):
            if _belongs(unread, path):
                unread.unlink(missing_ok=True)


def tensor_files(path: Path) -> list[Path]:
    """Return the files of tensors that an ONNX file reads; none if it is no such file."""
    import onnx
    from google.protobuf.message import DecodeError

    places: set[str] = set()
    with suppress(FileNotFoundError, DecodeError):
        graph = onnx.load(path, format="protobuf", load_external_data=False).graph
        entries = [entry for tensor in graph.initializer for entry in tensor.external_data]
        places = {entry.value for entry in entries if entry.key == "location"}
    return [path.parent / place for place in sorted(places)]


def size_of(path: Path) -> int:
    """Return the bytes of an ONNX file and of the tensors beside it."""
    return sum(part.stat().st_size for part in (path, *tensor_files(path)))


def _digest(tensors: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
        found.update(tensor.tobytes())
    return found.hexdigest()[:16]


def _belongs(data: Path, path: Path) -> bool:
    """Tell by its name whether a file of tensors is this one's alone, and not of others too."""
    name = rf"{re.escape(path.name)}(\.[0-9a-f]{{16}})?\.data"
    return data.parent == path.parent and re.fullmatch(name, data.name) is not None
