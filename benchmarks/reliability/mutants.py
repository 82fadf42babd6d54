"""Make the faults of tests/mutants.toml, one at a time, and tell which of them no test sees.

python -m benchmarks.reliability.mutants --json FILE [--only WORD ...]

Each is made in a copy of the checkout, and its tests must fail: it is killed, or it survived,
and a test is missing. The tests that saw faults run without one, too, and must pass. It goes on
where it was stopped; what survived is tried again.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from pathlib import Path

from benchmarks.provenance import commit

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1200  # seconds of the tests of a fault
# what most tests import: once, in the process that is forked for each fault
PRELOADED = (
    "torch", "torch._dynamo", "torch.onnx", "triton", "pytest", "numpy", "timm", "onnx", "datasets",
    "onnxscript", "onnxruntime", "sklearn.linear_model", "transformers", "transformers.trainer",
    "transformers.models.bert.modeling_bert", "transformers.models.opt.modeling_opt",
    "transformers.models.gpt2.modeling_gpt2", "hypothesis",
)  # fmt: skip


class Checkout:
    """A copy of the checkout to make faults in, and a folder in which its package is installed."""

    def __init__(self, folder: Path) -> None:
        self.root, self.installed = folder / "checkout", folder / "installed"
        listed = ["git", "ls-files", "-co", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in names.splitlines():
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.root / name)
        package = self.installed / "quanttune"
        package.mkdir(parents=True)
        for part in [*(self.root / "quanttune").iterdir(), self.root / "triton_kernels"]:
            (package / part.name).symlink_to(part)
        for kernels in (ROOT / "quanttune").glob("_C*.so"):
            shutil.copy(kernels, package)

    @contextlib.contextmanager
    def with_fault(self, file, text, replacement):
        path = self.root / file
        right = path.read_text()
        if right.count(text) != 1:
            raise SystemExit(f"{file} holds {right.count(text)} times, and not once: {text}")
        path.write_text(right.replace(text, replacement))
        try:
            if path.suffix in (".cpp", ".h"):
                self.compile()
            yield
        finally:
            path.write_text(right)

    def compile(self):
        built = self.root / "build" / "lib"
        build = ["setup.py", "-q", "build", "--build-base", "build/base", "--build-lib", str(built)]
        subprocess.run(
            [sys.executable, *build], cwd=self.root, check=True, stdout=subprocess.DEVNULL
        )
        for kernels in built.glob("quanttune/_C*.so"):
            (self.installed / "quanttune" / kernels.name).unlink()
            shutil.copy(kernels, self.installed / "quanttune")

    def test(self, tests, log):
        """Run tests, up to the first that fails, in a fork; return pytest's exit status."""
        if child := os.fork():
            return _status(child)
        try:
            self._run(tests, log)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)  # nothing of the parent's is to be ended here

    def _run(self, tests, log):
        os.setsid()
        os.chdir(self.root)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(self.installed), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path[:] = [str(self.installed), *(p for p in sys.path if p != str(ROOT / "benchmarks"))]
        import pytest

        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
        options += [
            "-rfE",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
        ]  # of what is preloaded
        status = pytest.main([*options, *(f"tests/{test}" for test in tests)])
        sys.stdout.flush()
        os._exit(status)


def _status(child):
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def judged(status, log):
    """Return what came of a fault, and the test that saw it."""
    said = log.read_text(errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", said, re.MULTILINE)
    # 1: a test failed. Else nothing was tested (2 to 5), or the process died
    outcome = {0: "survived", 1: "killed"}.get(status, f"broken: status {status}")
    if status not in (0, 1):
        print(said[-2000:])
    return {"outcome": outcome, "by": failed[1] if failed else None}


def preload():
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="words of the names of faults")
    arguments = parser.parse_args()
    mutants = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    mutants = {f"{m['name']} [{digest(m)}]": m for m in mutants}
    every = mutants
    if arguments.only:
        mutants = {k: m for k, m in mutants.items() if any(word in k for word in arguments.only)}
    found = {"cores": os.cpu_count(), "control": {}, "mutants": {}}
    if arguments.json.exists():
        found = json.loads(arguments.json.read_text())
        found["mutants"] = {k: one for k, one in found["mutants"].items() if k in every}
    now = commit()
    preload()

    def keep(part, name, begin, outcome):
        seconds = round(time.monotonic() - begin)
        found["control"].clear()
        found[part][name] = {**outcome, "seconds": seconds, "commit": now}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {outcome['outcome']} ({seconds} s) {outcome['by'] or ''}", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants") as folder:
        checkout, log = Checkout(Path(folder)), Path(folder) / "log"
        for key, mutant in mutants.items():
            if found["mutants"].get(key, {}).get("outcome") == "killed":
                continue
            begin = time.monotonic()
            with checkout.with_fault(mutant["file"], mutant["text"], mutant["replacement"]):
                outcome = judged(checkout.test(mutant["tests"], log), log)
            keep("mutants", key, begin, {"file": mutant["file"], **outcome})
        # what fails without a fault tells nothing
        seen_by = sorted({one["by"] for one in found["mutants"].values() if one["by"]})
        begin = time.monotonic()
        keep("control", f"{len(seen_by)} tests", begin, judged(checkout.test(seen_by, log), log))
    alive = [name for name, one in found["mutants"].items() if one["outcome"] != "killed"]
    alive += [name for name, one in found["control"].items() if one["outcome"] != "survived"]
    print(f"{len(found['mutants'])} faults, not seen or red without them: {alive or 'none'}")
    raise SystemExit(bool(alive))


def digest(mutant):
    """Return a few letters that change with a fault or its tests."""
    return hashlib.sha256(json.dumps(mutant, sort_keys=True).encode()).hexdigest()[:8]


if __name__ == "__main__":
    main()
