"""Damaged files and descriptions, as anybody may send them: refused in words, or what they say."""

import json
import math
import random
import shutil
import struct
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import torch
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

NASTY = [
    None, True, False, 0, -1, 1, 2**31, -(2**70), 8.5, 1e308, math.nan, math.inf, "", "8", "é\0",
    "../x", "norm", "qkv", [], {}, [[]], {"": 0}, ["qkv", "qkv"], [None],
]  # fmt: skip


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


def at(value, place):
    for step in place:
        value = value[step]
    return value


def change_json(chance, text):
    """Change a JSON text at one place: replaced, left out, moved, another's value, or very deep."""
    value, places = json.loads(text), places_in(text)
    *above, key = chance.choice(places)
    holder = at(value, above)
    way = chance.choice(["replace", "leave out", "rename", "another's", "deep", "a digit"])
    if way == "leave out":
        del holder[key]
    elif way == "rename" and isinstance(holder, dict):
        holder[chance.choice([*map(str, NASTY), *map(str, holder)])] = holder.pop(key)
    elif way == "another's":
        holder[key] = at(json.loads(text), chance.choice(places))
    elif way == "deep":
        depth = chance.choice([1, 90])
        holder[key] = json.loads("[" * depth + "]" * depth)
    elif way == "a digit" and type(holder[key]) in (int, float):
        holder[key] += chance.choice([-1, 1, 0.5])
    else:
        holder[key] = chance.choice(NASTY)
    return json.dumps(value)


def damaged(chance, whole):
    """Return the bytes of a file, changed."""
    (size,) = struct.unpack("<Q", whole[:8])
    header, tensors = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    way = chance.choice(["bits", "cut", "header", "description", "number", "size"])
    if way in ("bits", "cut"):
        return damaged_bytes(chance, whole, way)
    if way == "number":
        at = chance.randrange(len(tensors) // 4)
        number = chance.choice([chance.randbytes(4), struct.pack("<f", chance.choice(NUMBERS))])
        tensors = tensors[: 4 * at] + number + tensors[4 * at + 4 :]
    elif way == "header":
        header = json.loads(change_json(chance, json.dumps(header)))
    elif way == "description":
        about = header["__metadata__"]
        about["quantization_config"] = change_json(chance, about["quantization_config"])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    length = chance.getrandbits(chance.randrange(65)) if way == "size" else len(text)
    return struct.pack("<Q", length) + text + tensors


NUMBERS = [0.0, -0.0, math.nan, math.inf, -math.inf, -1.0, 1e-45, 3e38]


def damaged_bytes(chance, whole, way):
    if way == "cut":
        return whole[: chance.randrange(len(whole))]
    changed = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(len(whole))] ^= chance.randint(1, 255)
    return bytes(changed)


def many(times, attack):
    """Attack many times by one seed, since drawing takes longer; return how often."""

    def attacked(data):
        chance = random.Random(data.draw(st.integers(0, 2**63), label="seed"))
        for case in range(times):
            try:
                attack(chance)
            except Exception as error:
                error.add_note(f"the case {case} of its seed")
                raise
        return times

    return attacked


# ----------------------------------------------------------------------------------------- attacks


def load(chance):
    """A damaged file is refused by a ValueError, and the model stays; or it is what was loaded."""
    _, whole = saved(chance.choice(sorted(KINDS)))
    path, model = scratch() / "m", VICTIMS.take()
    path.write_bytes(damaged(chance, whole))
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


def description(chance):
    """A changed description is refused by a ValueError, or is what the model says that it is."""
    text, _ = saved(chance.choice(sorted(KINDS)))
    described = json.loads(change_json(chance, text))
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


def run_folder(chance):
    """A run with a damaged file is refused, or goes on from what is whole."""
    folder, run = whole_run(), RunFolder(scratch() / "run")
    shutil.rmtree(run.path, ignore_errors=True)
    shutil.copytree(folder, run.path)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    name = chance.choice(files)
    whole = (folder / name).read_bytes()
    ways = ["gone", "a folder", *(["bits", "cut"] if whole else [])]
    ways += ["json"] if name.suffix == ".json" else []
    way = chance.choice(ways)
    if way in ("bits", "cut"):
        (run.path / name).write_bytes(damaged_bytes(chance, whole, way))
    elif way == "json":
        (run.path / name).write_text(change_json(chance, whole.decode()))
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


ON_FILES = {attack.__name__: many(20, attack) for attack in (description, load, run_folder)}
