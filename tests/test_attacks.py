"""A few cases of every attack, the same ones each time; `make attack` draws others."""

import json
import subprocess
import sys

import pytest
from attacks import IN_MEMORY
from attacks_on_files import ON_FILES
from attacks_on_models import ON_MODELS, STEPS
from attacks_on_processes import ON_PROCESSES
from attacks_on_work import ON_WORK, interrupted_along
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import linux_memory
from oracle import quiet
from packages import ROOT

ATTACKS = IN_MEMORY | ON_FILES | ON_MODELS | ON_WORK | ON_PROCESSES
# these take longer, or fork: in forks of this process autograd does not work, nor torch's fill of
# memory, which the tests ask for. Some cases are below; other files kill runs, and export
OTHERS = (
    "soak", "made_export", "moments", "forks", "killed_tune", "interrupted_tune", "killed_command",
    "interrupted_export", "interrupted_export_torch", "interrupted_verify",
)  # fmt: skip
CASES = dict.fromkeys(IN_MEMORY, 25) | dict.fromkeys(ON_MODELS, 15)


# what Python says of an interrupt in the callback of a weak reference, where it is lost
lost = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def few(cases):
    return settings(
        max_examples=cases,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@quiet
@lost
@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in OTHERS])
def test_an_attack_finds_nothing(name):
    attack = ATTACKS[name]

    @few(CASES.get(name, 5))
    @given(st.data())
    def attacked(data):
        attack(data)

    attacked()


@quiet
@lost
@pytest.mark.parametrize(
    "name",
    ["attach", "clip_softmax", "gate_attention", "distill", "learn_scales", "freeze_scales"],
)
def test_an_interrupt_leaves_the_model_as_before_wherever_it_comes(name):
    """What is left halfway in two places of a hundred is not found by five draws."""
    assert interrupted_along(name, 11) > 10


@pytest.mark.parametrize(
    ("names", "cases", "found"),
    [
        (["moments", "forks"], 2, [2, 2]),
        pytest.param(["soak"], 1, [STEPS], marks=linux_memory),  # its cases are steps
    ],
    ids=["forks", "soak"],
)
def test_attacks_in_a_process_of_their_own(names, cases, found, tmp_path):
    """What forks, and what measures the memory that is left, which here others take too."""
    command = [sys.executable, "-m", "benchmarks.reliability.attack", "--only", *names]
    command += ["--json", str(tmp_path / "found.json"), "--cases", str(cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    written = json.loads((tmp_path / "found.json").read_text())
    assert done.returncode == 0, written
    assert [one["cases"] for one in written["attacks"].values()] == found
