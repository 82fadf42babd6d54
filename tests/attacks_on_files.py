"""Damaged files and descriptions, as anybody may send them: refused in words, or what they say."""

import json
import shutil
import struct
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import torch
from attacks import attacks_in
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import quanttune as qt
from quanttune.jobs import checkpoints
from quanttune.jobs.run_folder import RunFolder
from quanttune.quantization.saving.description import describe, from_description

MEMORY = Path("/dev/shm")  # a disk in memory: what is tried is what is read, not the disk


class Block(nn.Module):
    """What has sites of all kinds: a norm, attention, a residual sum, Linear modules."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.mix(nn.functional.scaled_dot_product_attention(q, k, v))
        return self.head(x)


EXAMPLE = torch.linspace(-2, 2, 2 * 5 * 8).view(2, 5, 8)
KINDS = {
    "plain": {},
    "equalized": {"methods": ["smoothquant"]},
    "learned": {},
    "zero points": {"symmetric": False},
    "dynamic": {"calibrator": "dynamic"},
    "overridden": {"overrides": {"head": None, "mix": {"bits": 8}}, "weights": "tensor"},
}


@cache
def scratch():
    """Return a folder for as long as the process lives."""
    return Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))


@cache
def saved(kind):
    """Return the description of a quantized model as JSON, and the bytes of its file."""
    torch.manual_seed(0)
    data = None if kind == "dynamic" else [EXAMPLE]
    model = qt.quantize(Block().eval(), 4, data=data, **KINDS[kind])
    if kind == "learned":
        qt.learn_scales(model)
    model(EXAMPLE)  # a dynamic model without data finds its functional sites in a forward
    qt.save(model, scratch() / "saved")
    return json.dumps(describe(model)), (scratch() / "saved").read_bytes()


class Victims:
    """A float model to load into, which is made anew only once it was changed."""

    def __init__(self):
        self.model = None

    def take(self):
        """Return a float model and what it is."""
        if self.model is None:
            torch.manual_seed(1)
            self.model = Block().eval()
            self.before = bits_of(self.model.state_dict())
            self.state = state(self.model)
        model, self.model = self.model, None
        return model

    def give_back(self, model):
        """Take a model back that should be as it was."""
        assert state(model) == self.state
        assert bits_of(model.state_dict()) == self.before
        self.model = model


VICTIMS = Victims()


def state(model):
    """Return all that a model is, besides its numbers."""
    return [
        (type(m), m.training, sorted(vars(m)), sorted(m._modules), hooks_of(m))
        for m in model.modules()
    ]


def hooks_of(module):
    return len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)


def bits_of(tensors):
    """Return tensors as something that equals itself, NaN or not."""
    return {
        name: (x.dtype, x.shape, x.numpy().tobytes())
        for name, x in tensors.items()
        if x is not None
    }


# ------------------------------------------------------------------------------------------ damage

NASTY = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=9),
    st.sampled_from([[], {}, [[]], {"": 0}, "../x", "norm", "", 8.5, "8", 1e308, ["qkv", "qkv"]]),
)  # fmt: skip


@cache
def places_in(text):
    """Return the places of a JSON text, all but the whole."""
    found = []

    def look(value, place):
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                found.append((*place, key))
                look(inner, found[-1])

    look(json.loads(text), ())
    return found


def draw_from(data, values, label):
    """Draw one of many values; sampled_from would look at all of them."""
    return values[data.draw(st.integers(0, len(values) - 1), label=label)]


def at(value, place):
    for step in place:
        value = value[step]
    return value


def change_json(data, text):
    """Change a JSON text at one place: replaced, left out, moved, another's value, or very deep."""
    value, places = json.loads(text), places_in(text)
    *above, key = draw_from(data, places, "place")
    holder = at(value, above)
    way = draw_from(data, ["replace", "leave out", "rename", "another's", "deep"], "way")
    if way == "leave out":
        del holder[key]
    elif way == "rename" and isinstance(holder, dict):
        holder[data.draw(st.text(max_size=9), label="name")] = holder.pop(key)
    elif way == "another's":
        holder[key] = at(json.loads(text), draw_from(data, places, "from"))
    elif way == "deep":
        depth = draw_from(data, [1, 90], "depth")
        holder[key] = json.loads("[" * depth + "]" * depth)
    else:
        holder[key] = data.draw(NASTY, label="value")
    return json.dumps(value)


def damaged(data, whole):
    """Return the bytes of a file, changed."""
    (size,) = struct.unpack("<Q", whole[:8])
    header, tensors = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    ways = ["bits", "cut", "header", "description", "number", "size"]
    way = data.draw(st.sampled_from(ways), label="way")
    if way in ("bits", "cut"):
        return damaged_bytes(data, whole, way)
    if way == "number":
        at = data.draw(st.integers(0, len(tensors) // 4 - 1), label="which")
        number = data.draw(st.floats(width=32), label="number")
        tensors = tensors[: 4 * at] + struct.pack("<f", number) + tensors[4 * at + 4 :]
    elif way == "header":
        header = json.loads(change_json(data, json.dumps(header)))
    elif way == "description":
        about = header["__metadata__"]
        about["quantization_config"] = change_json(data, about["quantization_config"])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    length = data.draw(st.integers(0, 2**64 - 1), label="size") if way == "size" else len(text)
    return struct.pack("<Q", length) + text + tensors


def damaged_bytes(data, whole, way):
    if way == "cut":
        return whole[: data.draw(st.integers(0, len(whole) - 1), label="length")]
    changed = bytearray(whole)
    for at in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        changed[at] ^= data.draw(st.integers(1, 255))
    return bytes(changed)


# ----------------------------------------------------------------------------------------- attacks


def attack_load(data):
    """A damaged file is refused by a ValueError, and the model stays; or it is what was loaded."""
    _, whole = saved(data.draw(st.sampled_from(sorted(KINDS)), label="kind"))
    path, model = scratch() / "m", VICTIMS.take()
    path.write_bytes(damaged(data, whole))
    try:
        qt.load(model, path)
    except ValueError:
        VICTIMS.give_back(model)
        return
    there = bits_of(load_file(path))
    assert bits_of(model.state_dict()) == there
    qt.save(model, scratch() / "again")
    assert bits_of(load_file(scratch() / "again")) == there
    try:
        model(EXAMPLE)
    except RuntimeError as error:  # places in the code are checked once they are called
        if "was never reached during calibration" not in str(error):
            raise


def attack_description(data):
    """A changed description is refused by a ValueError, or is what the model says that it is."""
    text, _ = saved(data.draw(st.sampled_from(sorted(KINDS)), label="kind"))
    described = json.loads(change_json(data, text))
    model = VICTIMS.take()
    with ExitStack() as undo:
        try:
            from_description(model, described, undo)
        except ValueError:
            pass
        else:
            assert sites_of(describe(model)) == sites_of(described)
    VICTIMS.give_back(model)


def sites_of(described):
    """Return a description without how its groups are named and ordered."""
    groups = {
        name: sorted(
            json.dumps([target, {k: v for k, v in group.items() if k != "targets"}], sort_keys=True)
            for group in part.values()
            for target in group["targets"]
        )
        for name, part in described.items()
        if name.endswith("_groups")
    }
    others = {name: part for name, part in described.items() if name not in groups}
    return json.dumps({**others, **groups}, sort_keys=True)


@cache
def whole_run():
    """Return a folder of a run of 4 steps: two checkpoints and no model."""
    folder = scratch() / "whole"
    run = RunFolder(folder)
    run.begin({"settings": {"steps": 4, "seed": 0}, "data": {"rows": 8}})
    for step in (2, 4):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "model.safetensors").write_bytes(np.arange(step, dtype=np.int32).tobytes())
        logged = {"log_history": [{"step": n, "loss": 1.0 / n} for n in range(1, step + 1)]}
        (checkpoint / "trainer_state.json").write_text(json.dumps(logged))
        checkpoints.mark(checkpoint)
    return folder


def attack_run_folder(data):
    """A run with a damaged file is refused, or goes on from what is whole."""
    folder, run = whole_run(), RunFolder(scratch() / "run")
    shutil.rmtree(run.path, ignore_errors=True)
    shutil.copytree(folder, run.path)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    name = data.draw(st.sampled_from(files), label="file")
    whole = (folder / name).read_bytes()
    ways = ["gone", "a folder", *(["bits", "cut"] if whole else [])]
    ways += ["json"] if name.suffix == ".json" else []
    way = data.draw(st.sampled_from(ways), label="way")
    if way in ("bits", "cut"):
        (run.path / name).write_bytes(damaged_bytes(data, whole, way))
    elif way == "json":
        (run.path / name).write_text(change_json(data, whole.decode()))
    else:
        (run.path / name).unlink()
        if way == "a folder":
            (run.path / name).mkdir()
    config = {"settings": {"steps": 4, "seed": 0}, "data": {"rows": 8}}
    try:
        run.check(config, resume=True)
        newest, _ = run.resume(config)
    except (ValueError, OSError):  # the command line tells both in a line
        return
    history = [] if newest is None else json.loads((newest / "trainer_state.json").read_text())
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines == (history["log_history"] if history else [])
    for path in [] if newest is None else newest.glob("[mt]*"):
        assert path.read_bytes() == (folder / newest.name / path.name).read_bytes()


ON_FILES = attacks_in(globals())
