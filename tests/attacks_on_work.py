"""What is under way is interrupted, killed, or done by several threads and processes at once.

Each attack draws one case, as in attacks.py, and raises if something is left behind or lost.
"""

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from attacks import attacks_in
from attacks_on_files import EXAMPLE, Block, bits_of, state
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import quanttune as qt
from quanttune.jobs.publication import publish, reserved

PACKAGE = str(Path(qt.__file__).parent)


class Interrupted:
    """Raises KeyboardInterrupt where Python looks for signals in the package, the n-th time.

    That is where a function begins, and behind calls of what is written in C.
    """

    def __init__(self, left):
        self.left, self.seen = left, 0

    def __enter__(self):
        sys.setprofile(self.look)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def look(self, frame, event, _):
        if event in ("call", "c_return") and self.watches(frame):
            self.seen += 1
            if self.seen == self.left:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def watches(self, frame):
        return frame.f_code.co_filename.startswith(PACKAGE)


@contextlib.contextmanager
def fresh():
    """Yield a float model and a folder."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        yield Block().eval(), Path(folder)


def bits(model):
    return bits_of(model.state_dict())


STEPS = {}  # how many places there are to interrupt each function at


def interrupt(data, name, function):
    """Interrupt a function somewhere; tell whether it ended before."""
    share = data.draw(st.integers(0, 10**6), label="millionths of the way")
    if name not in STEPS:
        with Interrupted(0) as counting:
            function()
        STEPS[name] = counting.seen
        return True
    ended = False
    with contextlib.suppress(KeyboardInterrupt):
        with Interrupted(1 + share * (STEPS[name] - 1) // 10**6):
            function()
        ended = True
    assert torch._C._len_torch_function_stack() == 0
    assert torch.is_grad_enabled()
    assert threading.active_count() == 1 + sum(t.daemon for t in threading.enumerate())
    return ended


def attack_interrupted_quantize(data):
    methods = data.draw(
        st.sampled_from([[], ["smoothquant"], ["gptq"], ["erq"], ["bias_correction"]])
    )
    batches = [EXAMPLE[:1], EXAMPLE[1:]]
    with fresh() as (model, _):
        before, numbers = state(model), bits(model)
        if not interrupt(
            data,
            f"quantize {methods}",
            lambda: qt.quantize(model, 4, methods=methods, data=batches),
        ):
            assert state(model) == before
            assert bits(model) == numbers
            qt.quantize(model, 4, methods=methods, data=batches)
        answer = model(EXAMPLE)
    with fresh() as (other, _):
        assert torch.equal(qt.quantize(other, 4, methods=methods, data=batches)(EXAMPLE), answer)


def attack_interrupted_forward(data):
    with fresh() as (model, _):
        qt.quantize(model, 4, data=[EXAMPLE])
        expected, before = model(EXAMPLE), state(model)
        interrupt(data, "forward", lambda: model(EXAMPLE))
        assert state(model) == before
        assert torch.equal(model(EXAMPLE), expected)
        assert torch.equal(EXAMPLE + EXAMPLE, 2 * EXAMPLE)


def attack_interrupted_tuning(data):
    """Steps after an interrupted one are those of a model that was never interrupted."""

    def step():
        loss = tuner.combine(model(EXAMPLE).square().mean())
        loss.backward()

    with fresh() as (model, _):
        before = state(model.train())
        tuner = qt.attach(model, 0.5, "constant")
        step()
        wanted = bits_of({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
        interrupt(data, "tuning", step)
        model.zero_grad()
        step()
        assert bits_of({n: p.grad for n, p in model.named_parameters()}) == wanted
        tuner.detach()
        assert state(model) == before


def attack_interrupted_save(data):
    """A file is the older or the newer, and nothing lies beside it."""
    with fresh() as (model, folder):
        qt.quantize(model, 4, data=[EXAMPLE])
        qt.save(model, folder / "m")
        older = (folder / "m").read_bytes()
        with torch.no_grad():
            model.head.weight += 1
        interrupt(data, "save", lambda: qt.save(model, folder / "m"))
        found = (folder / "m").read_bytes()
        qt.save(model, folder / "n")
        assert found in (older, (folder / "n").read_bytes())
        assert sorted(path.name for path in folder.iterdir()) == ["m", "n"]


def attack_interrupted_load(data):
    with fresh() as (model, folder), fresh() as (other, _):
        qt.save(qt.quantize(model, 4, data=[EXAMPLE]), folder / "m")
        with torch.no_grad():
            other.head.weight += 1
        before, numbers = state(other), bits(other)
        if interrupt(data, "load", lambda: qt.load(other, folder / "m")):
            assert torch.equal(other(EXAMPLE), model(EXAMPLE))
        else:
            assert state(other) == before
            assert bits(other) == numbers


def attack_interrupted_export(data):
    with fresh() as (model, folder):
        qt.quantize(model, 8, data=[EXAMPLE])
        before, expected = state(model), model(EXAMPLE)
        path = folder / "m.onnx"
        ended = interrupt(data, "export", lambda: qt.export_onnx(model, EXAMPLE, path))
        assert state(model) == before
        assert torch.equal(model(EXAMPLE), expected)
        assert [p.name for p in folder.iterdir()] in ([], ["m.onnx"])
        assert path.exists() or not ended


# ------------------------------------------------------------------------------------------ kills


def killed_after(seconds, function):
    """Run a function in a process of its own that is killed after a while."""
    if child := os.fork():
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1] == 0
    try:
        function()
    finally:
        os._exit(0)


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


def attack_killed_tune(data):
    """A run that was killed, twice if need be, ends with the bits of one that was not."""
    from tune_cases import finished, prepared, tuned

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = prepared(folder)
        for _ in range(2):
            moment = data.draw(st.integers(0, 2500), label="milliseconds") / 1e3
            killed_after(moment, lambda: tuned(arguments, folder / "run"))
        tuned(arguments, folder / "run")
        tuned(arguments, folder / "other")
        assert finished(folder / "run") == finished(folder / "other")


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


ON_WORK = attacks_in(globals())
