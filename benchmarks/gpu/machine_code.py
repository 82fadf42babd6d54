"""Read the machine code of a kernel for NVIDIA's GPUs: instructions, loops, the shortest way."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.M)
_ALWAYS = re.compile(r"BRA 0x[0-9a-f]+")  # a branch without a condition


class Loop(NamedTuple):
    """What a branch back repeats, by the indices of its first and last instruction."""

    first: int
    last: int


@dataclass(frozen=True)
class MachineCode:
    """The instructions of a kernel, in their order."""

    addresses: Sequence[int]
    instructions: Sequence[str]
    registers: int

    @classmethod
    def of(cls, disassembly: str) -> "MachineCode":
        """Read what `ahead_of_time.disassembly` returns."""
        lines = _LINE.findall(disassembly)
        registers = re.search(r"REG:(\d+)", disassembly)
        if not lines or registers is None:
            raise ValueError("this is no output of cuobjdump -res-usage -sass")
        addresses, instructions = zip(*lines, strict=True)
        numbers = [int(address, 16) for address in addresses]
        return cls(numbers, instructions, int(registers[1]))

    @property
    def spills(self) -> list[int]:
        """Which instructions read or write memory since registers were too few."""
        return self._found(r"\b(?:LDL|STL)\b")

    def wide(self, kind: str) -> int:
        """Return how many loads (LDG) or stores (STG) move 16 bytes."""
        return len(self._found(rf"\b{kind}\b.*\.128\b"))

    @cached_property
    def loops(self) -> list[Loop]:
        """The loops, by where they end."""
        ends = ((self._target(i), i) for i in range(self._end + 1))
        return [Loop(at, i) for at, i in ends if at is not None and at < i]

    def shortest(self, loop: Loop | None = None, past: str = "") -> int:
        """Return how many instructions the shortest way through a loop takes.

        Of the kernel, if None: from its begin to its end, and through every loop once. What is left
        out that way is rare: ties, remainders of rows, the division of extreme numbers. `past`
        begins the name of an instruction that the way has to pass.
        """
        return self._way(loop or Loop(0, self._end), min, past)

    def longest(self, loop: Loop) -> int:
        """Return the same of the longest way that calls no subroutine."""
        return self._way(loop, max, "")

    def _way(self, loop: Loop, choose: Callable[[list[int]], int], past: str) -> int:
        first, last = loop
        # from each instruction to behind the last: of any way, of one that passes what it has to
        ways: list[int | None] = [None] * (last - first + 1) + [0]
        passing: list[int | None] = [None] * (last - first + 2)
        for index in range(last, first - 1, -1):
            text, here = self.instructions[index], index - first
            onward = self._onward(index, last)
            for found in (ways, passing):
                possible = [way for i in onward if (way := found[i - first]) is not None]
                found[here] = 1 + choose(possible) if possible else None
            if text.startswith("EXIT"):
                ways[here], passing[here] = 1, None
            elif "EXIT" in text and not any(index <= end for _, end in self.loops):
                ways[here] = choose([1, ways[here] or 1])
            if "CALL" in text and self._target(index) is None:  # rare, and not counted
                ways[here], passing[here] = None, None
            if past in text:
                passing[here] = ways[here]
        if passing[0] is None:
            raise ValueError(f"no way through this code passes {past!r} and calls no subroutine")
        return passing[0]

    def _onward(self, index: int, last: int) -> list[int]:
        """Return which instructions may follow one, where branches back are not taken."""
        target = self._target(index)
        if target is None or not index < target <= last or self._passes_a_loop(index, target):
            return [index + 1]
        always = _ALWAYS.fullmatch(self.instructions[index])
        return [target] if always else [index + 1, target]

    def _passes_a_loop(self, index: int, target: int) -> bool:
        return any(index < loop.first and loop.last < target for loop in self.loops)

    @cached_property
    def _end(self) -> int:
        """The last instruction that is of no subroutine: it ends a program, or a last loop."""
        last = self._found(r"\bEXIT\b")[-1]
        if self.instructions[last].startswith("EXIT"):
            return last
        return min(index for index in self._found(r"^BRA\b") if index > last)

    @cached_property
    def _places(self) -> dict[int, int]:
        return {address: index for index, address in enumerate(self.addresses)}

    def _target(self, index: int) -> int | None:
        # sm_80 leaves some loops by a call of what follows them
        branch = re.search(r"\b(?:BRA|CALL)\b.*?(0x[0-9a-f]+)", self.instructions[index])
        target = self._places[int(branch[1], 16)] if branch else None
        return target if target is None or target <= self._end else None

    def _found(self, pattern: str) -> list[int]:
        return [i for i, text in enumerate(self.instructions) if re.search(pattern, text)]
