"""Where in a model's code an operation stands.

A place is the way from the forward of a module down to the call of the operation: of each function
on it the name, the line, counted from where the function begins, and the first and last column,
since in a @ b @ c two operations begin in one. It is the same for every size of the input, in every
thread, while a checkpoint computes a forward again, and while torch.compile traces it.
"""

import sys
from collections.abc import Iterator, Mapping
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import nn

# functions of these stand in a way for some calls of a model only, or are our own
_PASSED = (
    "torch.utils.checkpoint", "torch.utils._contextlib", "torch.utils._device", "torch.overrides",
    "torch.autograd", "torch._dynamo", "torch._compile", "torch.compiler",
    "quanttune.quantization.functional",
)  # fmt: skip
# modules of ours that round what they multiply or add themselves
_OURS = (
    "quanttune.quantization.modules", "quanttune.quantization.quantizer",
    "quanttune.quantization.other_grid", "quanttune.quantization.value_grids",
    "quanttune.quantization.channel_grids", "quanttune.quantization.restoration",
    "quanttune.deploy",
)  # fmt: skip
_MODULE = nn.Module._call_impl.__code__  # of modules that are not watched: those begin a way
JOIN = " -> "

_begins: dict[CodeType, str] = {}  # functions at which a way begins, and a local variable of each
_steps: dict[tuple[int, int], tuple[CodeType, str]] = {}  # with the code, so that its id stays its


class Place(NamedTuple):
    """The local variables of the function where a way begins, and the way."""

    variables: Mapping[str, Any]  # while torch.compile traces, one of them
    way: str
    is_apart: bool  # whether a module of ours, or one that was added later, calls the operation


def begins(code: CodeType, variable: str) -> None:
    """Let ways begin at a function; `find` returns its `variable`."""
    _begins[code] = variable


def find() -> Place:
    """Return the place of the operation that is under way.

    Raises:
        RuntimeError: no function that is known to `begins` is.
    """
    frame: FrameType | None = sys._getframe(1)
    steps: list[str] = []
    is_apart = False
    while frame is not None:
        if frame.f_code in _begins:
            return Place(frame.f_locals, JOIN.join(reversed(steps)), is_apart)
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(_PASSED):
            is_apart |= frame.f_code is _MODULE or (not steps and name.startswith(_OURS))
            steps.append(_step(frame.f_code, frame.f_lasti))
        frame = frame.f_back
    raise RuntimeError("an operation of a quantized model was called by none of its modules")


def trace() -> Place:
    """Do what `find` does while torch.compile traces, which has frames of its own."""
    steps: list[str] = []
    is_apart = False
    for frame in _traced_frames():
        if frame.f_code in _begins:
            name = _begins[frame.f_code]
            return Place({name: _value(frame, name)}, JOIN.join(reversed(steps)), is_apart)
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(_PASSED):
            is_apart |= not steps and name.startswith(_OURS)
            steps.append(_told(frame.f_code, *frame.current_instruction.positions))
    raise RuntimeError("an operation of a quantized model is compiled without its module")


def traced(variable: str) -> list[Any]:
    """Return a variable of the functions at which ways begin, that torch.compile is in."""
    frames = [frame for frame in _traced_frames() if _begins.get(frame.f_code) == variable]
    return [_value(frame, variable) for frame in frames]


def _traced_frames() -> Iterator[Any]:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    frame: Any = InstructionTranslator.current_tx().output.current_tx
    while frame is not None:
        yield frame
        frame = getattr(frame, "parent", None)


def _value(frame: Any, name: str) -> Any:
    return frame.symbolic_locals[name].realize().value


def _step(code: CodeType, offset: int) -> str:
    key = id(code), offset
    if key not in _steps:
        _steps[key] = code, _told(code, *list(code.co_positions())[offset // 2])
    return _steps[key][1]


def _told(
    code: CodeType, line: int | None, end_line: int | None, column: int | None, end: int | None
) -> str:
    first = code.co_firstlineno
    told = f"{code.co_qualname}+{(line or first) - first}"
    if column is None:  # Python can be told to forget columns (-X no_debug_ranges)
        return told
    lines = "" if end_line in (None, line) else f"{end_line - first}:"
    return f"{told}:{column}-{lines}{end}"
