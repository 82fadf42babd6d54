"""The list of faults that `make mutants` makes does not rot: what it changes is there, and once."""

import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MUTANTS = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_a_fault_can_be_made_and_has_tests(mutant):
    assert (ROOT / mutant["file"]).read_text().count(mutant["text"]) == 1
    assert mutant["replacement"] != mutant["text"]
    for test in mutant["tests"]:
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / "tests" / file).read_text()


def test_every_name_is_another_one():
    assert max(Counter(mutant["name"] for mutant in MUTANTS).values()) == 1
    assert len(MUTANTS) >= 60
