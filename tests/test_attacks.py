"""A few cases of every attack, the same ones each time; `make attack` draws others."""

import json
import subprocess
import sys

import pytest
from attacks import IN_MEMORY
from attacks_on_files import ON_FILES
from attacks_on_models import ON_MODELS, attack_soak
from attacks_on_processes import ON_PROCESSES
from attacks_on_work import ON_WORK
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import linux_memory
from oracle import quiet

ATTACKS = IN_MEMORY | ON_FILES | ON_MODELS | ON_WORK | ON_PROCESSES
# these take longer: exports, and processes in which autograd works; two cases of some are below,
# test_tune_command kills runs, and test_verify and the tests of exports hold the rest
OTHERS = (
    "soak", "made_export", "moments", "killed_tune", "interrupted_tune", "killed_command",
    "interrupted_export", "interrupted_export_torch", "interrupted_verify",
)  # fmt: skip
CASES = dict.fromkeys(IN_MEMORY, 25) | dict.fromkeys(ON_MODELS, 15)


def few(cases):
    return settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@quiet
@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in OTHERS])
def test_an_attack_finds_nothing(name):
    attack = ATTACKS[name]

    @few(CASES.get(name, 5))
    @given(st.data())
    def attacked(data):
        attack(data)

    attacked()


@quiet
@linux_memory
def test_a_short_soak():
    assert attack_soak(None, 200) == 200


def test_attacks_are_written_down_and_go_on(tmp_path):
    command = [sys.executable, "-m", "benchmarks.reliability.attack", "--only", "moments", "forks"]
    command += ["--json", str(tmp_path / "found.json"), "--cases"]
    for cases in ("2", "4"):
        done = subprocess.run([*command, cases], cwd=ROOT, capture_output=True, text=True)
        found = json.loads((tmp_path / "found.json").read_text())
        assert done.returncode == 0, found
    assert {name: one["cases"] for name, one in found["attacks"].items()} == {
        "moments": 6,
        "forks": 6,
    }
