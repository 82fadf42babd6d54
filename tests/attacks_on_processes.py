"""Processes that are killed, forked, or want the same thing; threads that do it all at once.

They fork, and autograd works in no fork of a process in which it has: each is tried in a process of
its own, or by `make attack`, which does so.
"""

import contextlib
import copy
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from attacks import attacks_in
from attacks_on_files import EXAMPLE, bits_of
from attacks_on_work import bits, check_nothing_is_left, fresh
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import quanttune as qt
from quanttune import ops
from quanttune.jobs.publication import publish, reserved

# ------------------------------------------------------------------------------------------ kills


def forked(function):
    """Run a function in a process of its own; return the process and where it writes its error."""
    reads, writes = os.pipe()
    if child := os.fork():
        os.close(writes)
        return child, os.fdopen(reads)
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        os.write(writes, traceback.format_exc().encode())
    finally:
        os._exit(code)


def killed_after(seconds, function):
    """Run a function in a process of its own that is killed after a while."""
    child, errors = forked(function)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with errors:
        if said := errors.read():
            raise AssertionError(said)


def done(function):
    """Run a function in a process of its own, and wait for its end."""
    child, errors = forked(function)
    with errors:
        said = errors.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"status {status}: {said}"


def attack_killed_save(data):
    """Whatever a killed process was writing, the file is whole."""
    torch.set_num_threads(1)
    with fresh() as (model, folder):
        model = nn.Sequential(model, nn.Linear(3, 500), nn.Linear(500, 500))  # takes a while
        qt.quantize(model, 4, data=[EXAMPLE])
        versions = []
        for value in (0.0, 1.0):
            nn.init.constant_(model[2].weight, value)
            qt.save(model, folder / "m")
            versions.append((folder / "m").read_bytes())
        nn.init.constant_(model[2].weight, 0.0)
        moment = data.draw(st.integers(0, 15_000), label="microseconds") / 1e6
        killed_after(moment, lambda: qt.save(model, folder / "m"))
        assert (folder / "m").read_bytes() in versions
        load_file(folder / "m")


def command(*arguments):
    """Run a command of the command line, silently; raise if it fails."""
    from quanttune import cli

    sys.argv = ["quanttune", *map(str, arguments)]
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    with tempfile.TemporaryFile("w+") as said:
        os.dup2(said.fileno(), 2)
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                said.seek(0)
                raise AssertionError(said.read()) from end


@cache
def prepared():
    """Return a folder with a model, its data, and the model quantized."""
    import datasets
    import torch._dynamo
    import torch.onnx  # noqa: F401
    import transformers.trainer  # noqa: F401
    from tune_cases import prepared

    from quanttune.cli import analyze, calibrate, export  # noqa: F401

    folder = Path(tempfile.mkdtemp())
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    prepared(folder)
    done(lambda: command(*COMMANDS["calibrate"](folder, folder / "quantized")))
    return folder


def dataset(folder):
    return "--data", folder / "rows.csv", "--task", "text-classification", "--tokens", 8


COMMANDS = {
    "calibrate": lambda folder, out: (
        "calibrate", folder / "model", *dataset(folder), "--out", out,
    ),
    "export": lambda folder, out: ("export", folder / "quantized", "--out", out),
    "analyze": lambda folder, out: (
        "analyze", folder / "model", *dataset(folder), "--rows", 4, "--limit", 4, "--out", out,
    ),
}  # fmt: skip


@cache
def undisturbed(name):
    """Return what a command writes, and how long it takes."""
    folder = prepared()
    begin = time.monotonic()
    done(lambda: command(*COMMANDS[name](folder, folder / f"{name}-whole")))
    return content(folder / f"{name}-whole"), time.monotonic() - begin


def content(path):
    """Return the digests of a file or a folder; of results what stays from run to run."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = {p.name: content(p) for p in sorted(path.iterdir()) if not p.name.startswith(".")}
    if "analysis.json" in found:
        numbers = json.loads((path / "analysis.json").read_text())
        del numbers["seconds"]
        return sorted(found), json.dumps(numbers, sort_keys=True)
    return found


def attack_killed_command(data):
    """A command that was killed left what is whole, or can be given again and ends the same."""
    name = data.draw(st.sampled_from(sorted(COMMANDS)), label="command")
    expected, seconds = undisturbed(name)
    share = data.draw(st.integers(0, 1000), label="thousandths of its time") / 1000
    folder = prepared()
    with tempfile.TemporaryDirectory(dir=folder) as other:
        out = Path(other) / "out"
        killed_after(share * seconds, lambda: command(*COMMANDS[name](folder, out)))
        if not out.exists() or content(out) != expected:
            done(lambda: command(*COMMANDS[name](folder, out)))
        assert content(out) == expected


def attack_killed_tune(data):
    """A run that was killed, twice if need be, ends with the bits of one that was not."""
    resumed(data, killed_after)


def attack_interrupted_tune(data):
    """So does one that got Ctrl-C, and nothing is left in its thread."""
    resumed(data, interrupted_after)


def resumed(data, stopped_after):
    from tune_cases import finished, tuned

    arguments, expected, seconds = tuned_once()
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        for _ in range(2):
            share = data.draw(st.integers(0, 1000), label="thousandths of its time") / 1000
            stopped_after(share * seconds, lambda: tuned(arguments, run))
        done(lambda: tuned(arguments, run))
        assert finished(run) == expected


@cache
def tuned_once():
    from tune_cases import finished, tuned

    folder = prepared()
    arguments = {"model": str(folder / "model"), "data": str(folder / "rows.csv")}
    begin = time.monotonic()
    done(lambda: tuned(arguments, folder / "tuned"))
    return arguments, finished(folder / "tuned"), time.monotonic() - begin


# --------------------------------------------------------------------- Ctrl-C at a moment in time


def interrupted_after(seconds, function):
    """Run a function in a process of its own that gets Ctrl-C after a while."""
    done(lambda: with_ctrl_c(seconds, function))


def with_ctrl_c(seconds, function):
    """Run a function that gets Ctrl-C after a while; tell whether it ended before."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    ended = False
    with contextlib.suppress(KeyboardInterrupt):
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            function()
            ended = True
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    check_nothing_is_left()
    return ended


def moments():
    """Return what is interrupted, how its model is made, and how much of it there is."""
    return {
        "quantize": (
            lambda model: model,
            lambda model, _: qt.quantize(model, 4, methods=["gptq"], data=[EXAMPLE, EXAMPLE]),
        ),
        "forward": (
            lambda model: qt.quantize(model, 4, data=[EXAMPLE]),
            lambda model, _: [model(EXAMPLE) for _ in range(20)],
        ),
        "tuning": (lambda model: model.train(), lambda model, _: steps(model)),
        "export": (
            lambda model: qt.quantize(model, 8, data=[EXAMPLE]),
            lambda model, folder: qt.export_onnx(model, EXAMPLE, folder / "m.onnx"),
        ),
    }


def steps(model):
    tuner = qt.attach(model, 0.5, "constant")
    try:
        for _ in range(5):
            tuner.combine(model(EXAMPLE).square().mean()).backward()
    finally:
        tuner.detach()
        model.zero_grad()


def attack_moments(data):
    """Ctrl-C at any moment, in torch too: the model is as before or whole, and can be used."""
    name = data.draw(st.sampled_from(sorted(moments())), label="function")
    share = data.draw(st.integers(0, 1000), label="thousandths of its time") / 1000
    prepare, call = moments()[name]

    def interrupted():
        with fresh() as (model, folder):
            prepare(model)
            call(copy.deepcopy(model), folder)  # what is done but once
            other, begin = copy.deepcopy(model), time.monotonic()
            call(other, folder)
            moment = share * (time.monotonic() - begin)
            before, whole = bits(model), bits(other)
            with_ctrl_c(moment, lambda: call(model, folder))
            if bits(model) != whole:
                assert bits(model) == before
                call(model, folder)
            assert bits(model) == whole
            assert torch.equal(EXAMPLE + EXAMPLE, 2 * EXAMPLE)

    done(interrupted)


# ------------------------------------------------------------------------------- several at a time


def attack_threads(data):
    """Threads that call one model, and threads that write one file, get what one would."""
    count = data.draw(st.integers(2, 6), label="threads")
    inputs = [EXAMPLE[:, : 1 + i % 5] * (i + 1) for i in range(8)]
    with fresh() as (model, folder):
        qt.quantize(model, 4, data=[EXAMPLE])
        expected = [model(x) for x in inputs]
        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(model, inputs))
            list(pool.map(lambda _: qt.save(model, folder / "m"), range(count)))
        assert all(map(torch.equal, found, expected))
        assert [path.name for path in folder.iterdir()] == ["m"]
        assert bits_of(load_file(folder / "m")) == bits(model)


WORK = {
    "statistics": lambda x, model: ops.outlier_statistics(x, x.shape[0], False),
    "rounding": lambda x, model: qt.fake_quant(x, torch.tensor(0.1), 8),
    "errors": lambda x, model: ops.quantization_errors(x, torch.tensor([0.1, 0.2]), -128, 127),
    "forward": lambda x, model: model(EXAMPLE),
}


def attack_forks(data):
    """Forked processes compute what their parent does, whatever it did before, on any threads."""
    before = data.draw(st.sampled_from(sorted(WORK)), label="before")
    names = data.draw(st.lists(st.sampled_from(sorted(WORK)), min_size=1, max_size=4), label="work")
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 4), label="threads"))
    try:
        with fresh() as (model, _):
            qt.quantize(model, 4, data=[EXAMPLE])
            x = torch.linspace(-3, 3, 1 << 19).view(4, -1)
            WORK[before](x, model)
            children = [
                (name, *forked(lambda name=name: compare(name, x, model))) for name in names
            ]
            for name, child, errors in children:
                end = time.monotonic() + 60
                while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
                    time.sleep(0.002)
                if not ended[0]:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                with errors:
                    assert ended == (child, 0), f"{name}: {ended or 'hangs'} {errors.read()}"
    finally:
        torch.set_num_threads(threads)


def compare(name, x, model):
    if name == "forward":  # torch's own kernels wait for the parent's threads, which are not there
        torch.set_num_threads(1)
    found = WORK[name](x, model)
    torch.set_num_threads(1)
    assert torch.equal(found, WORK[name](x, model))


class Part:
    def __init__(self, name, text):
        self.name, self.text = name, text

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text(self.text)


def attack_two_writers(data):
    """Of processes that write one folder one does, and the folder is its alone."""
    delays = data.draw(st.lists(st.integers(0, 3000), min_size=2, max_size=4), label="microseconds")
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "out"
        children = []
        for number, delay in enumerate(delays):
            if child := os.fork():
                children.append(child)
                continue
            try:
                time.sleep(delay / 1e6)
                with reserved(out):
                    publish(Part("model", str(number)), Part("words", str(number)), out)
                os._exit(0)
            except ValueError:
                os._exit(2)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(3)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == [0] + [2] * (len(delays) - 1), codes
        winner = str(codes.index(0))
        assert {p.name: p.read_text() for p in out.iterdir()} == {"model": winner, "words": winner}
        assert [path.name for path in Path(name).iterdir()] == ["out"]


ON_PROCESSES = attacks_in(globals())
