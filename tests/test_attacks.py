"""A few cases of every attack, the same ones each time; `make attack` draws others."""

import pytest
from attacks import IN_MEMORY
from attacks_on_files import ON_FILES
from attacks_on_processes import ON_PROCESSES
from attacks_on_work import ON_WORK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import quiet

# test_tune_command kills runs; exports take long, and make attack interrupts them
ATTACKS = IN_MEMORY | ON_FILES | ON_WORK | ON_PROCESSES
OTHERS = "killed_tune", "interrupted_export"


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

    @few(5 if name in ON_WORK else 25)
    @given(st.data())
    def attacked(data):
        attack(data)

    attacked()
