"""The tensors that every benchmark of an op takes: shapes x dtypes, as fixtures."""

import shutil
from typing import Any

import pytest
from torch import Tensor

from benchmarks import eager

compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)


def fixtures(shapes: dict[str, tuple[int, ...]]) -> tuple[Any, Any]:
    """Return a fixture of all shapes, and one of the last shape alone, each in every dtype."""
    cases = [
        pytest.param((shape, dtype), id=f"{name}, {dtype}")
        for name, shape in shapes.items()
        for dtype in eager.DTYPES
    ]
    return _fixture(cases), _fixture(cases[-len(eager.DTYPES) :])


def _fixture(cases: list[Any]) -> Any:
    @pytest.fixture(params=cases)
    def tensor(request: Any) -> Tensor:
        shape, dtype = request.param
        return eager.normal(shape, eager.DTYPES[dtype])

    return tensor
