"""What benchmarks/gpu counts in machine code, on a hand-worked listing."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.gpu.machine_code import Loop, MachineCode

sys.path.pop()  # other tests ask for what is installed

LISTING = """
 Function kernel: REG:40 STACK:0 SHARED:0
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA 0x90 ;
        /*0020*/                   LDG.E.128 R4, [R2] ;
        /*0030*/               @P1 BRA 0x60 ;
        /*0040*/                   FADD R4, R4, R5 ;
        /*0050*/                   CALL.REL.NOINC 0xc0 ;
        /*0060*/                   FADD R6, R6, R4 ;
        /*0070*/               @P2 BRA 0x20 ;
        /*0080*/                   STL [R1], R6 ;
        /*0090*/               @P3 EXIT ;
        /*00a0*/                   STG.E [R2], R6 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   RET.REL.NODEC R12 0x0 ;
        /*00d0*/                   BRA 0xd0 ;
"""


def test_a_hand_worked_listing():
    code = MachineCode.of(LISTING)
    assert code.registers == 40
    assert code.spills == [8]
    assert code.loops == [Loop(2, 7)]
    # a load, two branches and a sum; the other way calls a subroutine
    assert code.shortest(code.loops[0]) == code.longest(code.loops[0]) == 4
    # the branch around the loop is not taken, but the exit behind it
    assert code.shortest() == 2 + 4 + 2
    assert code.shortest(past="STG") == 2 + 4 + 4
    with pytest.raises(ValueError, match="no way"):
        code.shortest(past="BAR")


def test_a_rare_branch_makes_the_longest_way():
    code = MachineCode.of(LISTING.replace("CALL.REL.NOINC 0xc0", "FMUL R4, R4, R4"))
    assert code.shortest(code.loops[0]) == 4
    assert code.longest(code.loops[0]) == 6
    assert code.wide("LDG") == 1
    assert code.wide("STG") == 0


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="cuobjdump"):
        MachineCode.of("nothing")
