"""A few cases of every attack, the same ones each time; `make attack` draws others."""

import pytest
from attacks import IN_MEMORY
from attacks_on_work import ON_WORK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import quiet

# tests/test_tune_command.py kills runs, tests/test_export_external.py exports
OTHERS = {"killed_tune": 0, "interrupted_export": 0}


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

    @few(40 if name in IN_MEMORY else 8)
    @given(st.data())
    def attacked(data):
        attack(data)

    attacked()
