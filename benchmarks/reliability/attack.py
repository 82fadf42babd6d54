"""Attack for some minutes: every attack of tests/ in turn, with seeds that are written down.

python -m benchmarks.reliability.attack --json FILE [--minutes 30]

It goes on where it was stopped, with the seeds that follow, up to CASES of each attack. What fails
is written down with its seed and the case that hypothesis made of it. Exit status 1 if any did.
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
import traceback
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.provenance import commit

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from attacks import IN_MEMORY
from attacks_on_files import ON_FILES
from attacks_on_models import ON_MODELS
from attacks_on_processes import ON_PROCESSES
from attacks_on_work import ON_WORK

ATTACKS = IN_MEMORY | ON_FILES | ON_MODELS | ON_WORK | ON_PROCESSES
CASES = dict.fromkeys(ATTACKS, 200) | dict.fromkeys(IN_MEMORY, 20_000) | {"soak": 20_000}
# a million damaged files and descriptions
CASES |= {"description": 850_000, "load": 120_000, "run_folder": 30_000, "killed_save": 1000}
AT_ONCE = dict.fromkeys(ON_FILES, 200) | {"soak": 20}  # of a seed: these try several in each case
VERSIONS = ("torch", "numpy", "hypothesis", "safetensors")


def run(attack, number, cases):
    """Draw cases by a seed, in a process of its own; return how many were right, what failed."""
    reads, writes = os.pipe()
    if child := os.fork():
        os.close(writes)
        with os.fdopen(reads) as said:
            found = said.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return json.loads(found) if found else (0, f"the process ended with {status}")
    with os.fdopen(writes, "w") as says:
        json.dump(drawn(attack, number, cases), says)
    os._exit(0)


def drawn(attack, number, cases):
    """Draw cases; an attack that tries several each time returns how many."""
    done = 0

    @seed(number)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.data())
    def attacked(data):
        nonlocal done
        done += attack(data) or 1

    try:
        attacked()
    except Exception:  # whatever it is, it is written down
        return done, traceback.format_exc()
    return done, None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--only", nargs="*", help="names of attacks")
    parser.add_argument("--cases", type=int, help="of each, instead of all")
    arguments = parser.parse_args()
    found = {"runs": [], "attacks": {}}
    if arguments.json.exists():
        found = json.loads(arguments.json.read_text())
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    found["runs"].append({"commit": commit(), "cores": os.cpu_count(), "versions": versions})
    names = arguments.only or list(ATTACKS)
    wanted = dict.fromkeys(ATTACKS, arguments.cases) if arguments.cases else CASES
    end = time.monotonic() + 60 * arguments.minutes
    left = names
    while left and time.monotonic() < end:
        for name in left:
            if time.monotonic() > end:
                break
            one = found["attacks"].setdefault(name, {"cases": 0, "seeds": 0, "failures": []})
            # the first case of a seed is the simplest there is: not a few cases each
            cases = min(wanted[name] // 10, AT_ONCE.get(name, 1000)) or wanted[name]
            done, failure = run(ATTACKS[name], one["seeds"], cases)
            one["cases"] += done
            if failure:
                one["failures"].append({"seed": one["seeds"], "said": failure})
            one["seeds"] += 1
            print(f"{name}: {one['cases']} cases {'FAILED' if failure else ''}", flush=True)
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        left = [name for name in names if _tried(found["attacks"][name]) < wanted[name]]
    raise SystemExit(any(one["failures"] for one in found["attacks"].values()))


def _tried(one):
    """Return how many cases there were, of which a seed has one at most that failed."""
    return one["cases"] + len(one["failures"])


if __name__ == "__main__":
    main()
