"""A few cases of every attack, the same ones each time; `make attack` draws others."""

import pytest
from attacks import IN_MEMORY
from attacks_on_work import ON_WORK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import quiet

# test_tune_command kills runs; exports take long, and make attack interrupts them
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
@pytest.mark.parametrize("name", [*IN_MEMORY, *(name for name in ON_WORK if name not in OTHERS)])
def test_an_attack_finds_nothing(name):
    attack = (IN_MEMORY | ON_WORK)[name]

    @few(25 if name in IN_MEMORY else 5)
    @given(st.data())
    def attacked(data):
        attack(data)

    attacked()
