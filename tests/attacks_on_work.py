"""What is under way is interrupted: Ctrl-C, wherever it comes, leaves nothing behind.

Each attack draws one case, as in attacks.py, and raises if something is left behind or lost.
"""

import contextlib
import copy
import itertools
import sys
import tempfile
import threading
from functools import cache, partial
from pathlib import Path

import torch
from attacks import attacks_in
from attacks_on_files import EXAMPLE, Block, bits_of, state
from hypothesis import strategies as st
from models import opt, vit
from torch import nn

import quanttune as qt
from quanttune.quantization.methods import METHODS

PACKAGE = str(Path(qt.__file__).parent)


class Interrupted:
    """Raises KeyboardInterrupt where Python looks for signals in the package, the n-th time.

    That is where a function begins, of the package or called by it, and behind calls of what is
    written in C.
    """

    def __init__(self, left):
        self.left, self.seen = left, 0

    def __enter__(self):
        sys.setprofile(self.look)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def look(self, frame, event, _):
        if event in ("call", "c_return") and (self.watches(frame) or self.watches(frame.f_back)):
            self.seen += 1
            if self.seen == self.left:
                raise KeyboardInterrupt  # which ends the profile

    def watches(self, frame):
        return frame is not None and frame.f_code.co_filename.startswith(PACKAGE)


@contextlib.contextmanager
def fresh():
    """Yield a float model and a folder."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        yield Block().eval(), Path(folder)


def bits(model):
    return bits_of(model.state_dict())


# of these the one asks for a residual stream, the other for blocks
FITTING = sorted(set(METHODS) - {"rotate", "apq_vit"})
STEPS = {}  # how many places there are to interrupt each function at


def interrupt(data, name, function):
    """Interrupt a function somewhere; tell whether it ended before."""
    share = data.draw(st.integers(0, 10**6), label="millionths of the way")
    if name not in STEPS:
        with Interrupted(0) as counting:
            function()
        STEPS[name] = counting.seen
        return True
    return interrupted_at(1 + share * (STEPS[name] - 1) // 10**6, function)


def interrupted_at(place, function):
    """Interrupt a function at a place; tell whether it ended before."""
    with contextlib.suppress(KeyboardInterrupt), Interrupted(place) as interrupting:
        function()
    check_nothing_is_left()
    return interrupting.seen < place  # else the interrupt was seen, or lost in a callback


def check_nothing_is_left():
    """Check what a thread may be left with: modes, flags, and threads that go on."""
    assert torch._C._len_torch_function_stack() == 0
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.compiler.is_compiling()
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread() and thread.ident:
            thread.join(5)  # one that was told to end may still be about to
            assert not thread.is_alive()


def attack_interrupted_quantize(data):
    methods = data.draw(st.sampled_from([[], *([name] for name in FITTING)]), label="methods")
    batches = [EXAMPLE[:1], EXAMPLE[1:]]
    with fresh() as (model, _):
        before, numbers = state(model), bits(model)
        ended = interrupt(
            data,
            f"quantize {methods}",
            lambda: qt.quantize(model, 4, methods=methods, data=batches),
        )
        if not ended and state(model) == before:  # else it is whole, as its answer tells
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
    """Steps after an interrupted one, once forgotten, are those of one that never was."""

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
        tuner.forget()
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
        ended = interrupt(data, "load", lambda: qt.load(other, folder / "m"))
        if ended or state(other) != before:
            assert bits(other) == bits(model)
            assert torch.equal(other(EXAMPLE), model(EXAMPLE))
        else:
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


# ------------------------------------------------------------------- every other public function


def rounded(model, x, **options):
    return qt.quantize(model, 8, data=[x], **options)


def learned(model, x):
    qt.learn_scales(rounded(model, x))
    return model


@cache
def float_models():
    """Return models by what they are, each with what it is called with."""
    torch.manual_seed(0)
    decoder, images = opt(2), vit()
    both = nn.ModuleList([images.model.eval(), copy.deepcopy(images.model)])
    return {
        "block": (Block().eval(), EXAMPLE),
        "decoder": (decoder.model.eval(), decoder.inputs),
        "images": (images.model, images.inputs),
        "student and teacher": (both, images.inputs),
    }


@cache
def exported():
    """Return the file of a block."""
    with fresh() as (model, _):
        path = Path(tempfile.mkdtemp()) / "m.onnx"
        qt.export_onnx(rounded(model, EXAMPLE), EXAMPLE, path)
    return path


def as_it_is(model, x):
    return model


def marked(model, x):
    return rounded(model, x, methods=["prequant"])


def dynamic(model, x):
    return qt.quantize(
        model, 8, calibrator="dynamic", coverage="linear_inputs", overrides={"lm_head": None}
    )


def chosen(model, x):
    """Choose by how near the answers are, of few candidates."""
    expected = model(x)

    def nearness(other, rows):
        return -(other(x) - expected).square().mean().item()

    qt.auto(model, target="torch", data=[x], evaluate=nearness, rows=8, drop=1.0, minutes=1)


# of a float model, how it is before, and the call that is interrupted
CALLS = {
    "allocate_bits": ("block", as_it_is, lambda model, x: qt.allocate_bits(model, 5, data=[x])),
    "attach": ("block", as_it_is, lambda model, x: qt.attach(model, 0.5, "constant")),
    "auto": ("block", as_it_is, chosen),
    "clip_softmax": ("decoder", as_it_is, lambda model, x: qt.clip_softmax(model)),
    "gate_attention": ("decoder", as_it_is, lambda model, x: qt.gate_attention(model)),
    "rectify_attention": (
        "images",
        as_it_is,
        lambda model, x: qt.rectify_attention(model, [x]),
    ),
    "distill": ("student and teacher", as_it_is, lambda pair, x: qt.distill(*pair)),
    "synthesize_images": (
        "images",
        as_it_is,
        lambda model, x: qt.synthesize_images(model, 1, iterations=2),
    ),
    "requantize": (
        "block",
        rounded,
        lambda model, x: qt.requantize(
            model, 6, power_of_two=True, correct_weights=True, example=x
        ),
    ),
    "learn_outliers": ("block", marked, lambda model, x: qt.learn_outliers(model)),
    "export_torchao": (
        "decoder",
        dynamic,
        lambda model, x: exported_to_a_folder(qt.export_torchao, model),
    ),
    "learn_scales": ("block", rounded, lambda model, x: qt.learn_scales(model)),
    "freeze_scales": ("block", learned, lambda model, x: qt.freeze_scales(model)),
    "summary": ("block", rounded, lambda model, x: qt.summary(model)),
    "refit": ("block", as_it_is, lambda model, x: qt.refit(model, [x])),
    "rotate": ("decoder", as_it_is, lambda model, x: qt.rotate(model, [x])),
    "prefix": ("decoder", as_it_is, lambda model, x: qt.prefix(model, [1, 2])),
    "export_torch": ("block", rounded, qt.export_torch),
    "verify": ("block", rounded, lambda model, x: qt.verify(exported(), model, [x])),
    "export_compressed_tensors": (
        "decoder",
        partial(rounded, coverage="linear_inputs", overrides={"lm_head": None}),
        lambda model, x: exported_to_a_folder(qt.export_compressed_tensors, model),
    ),
}


def exported_to_a_folder(export, model):
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder) / "out")


def interrupted_call(name, data):
    """A call that is interrupted leaves the model as before, or whole; and can be repeated."""
    interrupted_by(name, lambda function: interrupt(data, name, function))


def interrupted_by(name, interrupt):
    """Interrupt a call, check what is left, and tell whether it ended before."""
    kind, prepare, call = CALLS[name]
    model, x = float_models()[kind]
    model = copy.deepcopy(model)
    prepare(model, x)
    before, numbers = state(model), bits(model)
    ended = interrupt(lambda: call(model, x))
    if not ended and (state(model), bits(model)) != whole(name):
        assert state(model) == before
        assert bits(model) == numbers
        call(model, x)
    assert (state(model), bits(model)) == whole(name)
    return ended


def interrupted_along(name, step):
    """Interrupt a call at every so many places, from its first one to its last; tell how many."""
    whole(name)
    places = itertools.count(1, step)
    ends = (interrupted_by(name, partial(interrupted_at, place)) for place in places)
    return next(count for count, ended in enumerate(ends) if ended)


@cache
def whole(name):
    """Return what a model is once a call has ended."""
    kind, prepare, call = CALLS[name]
    model, x = float_models()[kind]
    model = copy.deepcopy(model)
    prepare(model, x)
    call(model, x)
    return state(model), bits(model)


ON_WORK = attacks_in(globals()) | {
    f"interrupted_{name}": partial(interrupted_call, name) for name in CALLS
}
