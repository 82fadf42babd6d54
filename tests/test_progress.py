"""What quantize tells of its progress: everything, when it is done, and of how much."""

import copy
from itertools import groupby

import pytest
import torch
from equalized import EXAMPLES, grown
from rich.progress import Progress
from torch.utils.data import DataLoader, IterableDataset

import quanttune as qt
from quanttune.cli import terminal
from quanttune.progress import track
from quanttune.quantization.methods import GPTQ
from quanttune.quantization.state import weight_quantizers

BATCHES = 2
RANGES, PAIRS = ("smoothquant: ranges", BATCHES), ("smoothquant", 4)
CALIBRATING = ("calibrating", BATCHES)


class Endless(IterableDataset):
    """Three rows, which nobody knows before they are read."""

    def __iter__(self):
        return iter(torch.eye(3))


@pytest.mark.parametrize(
    ("items", "count", "total"),
    [
        ([5, 6], 2, 2),
        ([], 0, None),
        ((x for x in "abc"), 3, None),
        (DataLoader(torch.eye(3), 2), 2, 2),
        (DataLoader(Endless(), 2), 2, None),
    ],
)
def test_each_item_is_told_before_it_comes(items, count, total):
    told = []
    seen = [
        (len(told), told[-1]) for _ in track(items, "reading", lambda *event: told.append(event))
    ]
    assert told == [("reading", done, total) for done in range(count + 1)]
    assert seen == [(done + 1, ("reading", done, total)) for done in range(count)]


@pytest.mark.parametrize(
    ("name", "methods", "expected"),
    [
        ("vit", [], [CALIBRATING]),
        (
            "vit",
            ["smoothquant", "gptq"],
            # the head reads one token of the last LayerNorm; no two layers share their input
            [RANGES, PAIRS, CALIBRATING, ("gptq: finding layers", BATCHES), ("gptq", 9)],
        ),
        # query, key and value are one group
        ("bert", ["gptq"], [CALIBRATING, ("gptq: finding layers", BATCHES), ("gptq", 10)]),
        (
            "bert",
            ["bias_correction"],
            [
                CALIBRATING,
                ("bias_correction: finding layers", BATCHES),
                ("bias_correction: means", BATCHES),
                ("bias_correction", 10),
            ],
        ),
        (
            "bert",
            [GPTQ(hessian="fisher")],
            [
                CALIBRATING,
                ("gptq: finding layers", BATCHES),
                ("gptq: gradients", BATCHES),
                ("gptq", 14),
            ],
        ),
        (
            "bert",
            ["erq"],
            [
                CALIBRATING,
                ("erq: finding layers", BATCHES),
                ("erq: inputs of layers", BATCHES),
                ("erq", 14),
            ],
        ),
    ],
)
def test_every_step_is_told_from_none_to_all(name, methods, expected):
    example, told = EXAMPLES[name](), []
    data = example.inputs.split(2)
    qt.quantize(
        example.model, methods=methods, data=data, progress=lambda *event: told.append(event)
    )
    steps = [list(events) for _, events in groupby(told, key=lambda event: event[0])]
    assert steps == [[(what, i, total) for i in range(total + 1)] for what, total in expected]


def test_what_is_told_is_done():
    example = grown("vit")
    before, calls = copy.deepcopy(example.model.state_dict()), []
    example.model.register_forward_pre_hook(lambda *_: calls.append(1))
    told = []

    def progress(what, done, total):
        changed = [
            name
            for name, x in example.model.state_dict().items()
            if "norm" in name and name.endswith("weight") and not torch.equal(x, before[name])
        ]
        settled = [
            name for name, (_, q) in weight_quantizers(example.model).items() if q.scale is not None
        ]
        told.append((what, done, len(calls), len(changed), len(settled)))

    data = example.inputs.split(2)
    qt.quantize(example.model, methods=["smoothquant", "gptq"], data=data, progress=progress)
    # calls before a step, then of each batch; finding pairs takes one, and all layers all batches
    assert told == [
        *(("smoothquant: ranges", i, 1 + i, 0, 0) for i in range(3)),
        *(("smoothquant", i, 3, i, 0) for i in range(5)),
        *(("calibrating", i, 3 + i, 4, 0) for i in range(3)),
        *(("gptq: finding layers", i, 5 + i, 4, 0) for i in range(3)),
        *(("gptq", i, 7 + 2 * (i > 0), 4, i) for i in range(10)),
    ]


def test_a_step_of_as_many_as_the_one_before_has_its_own_time(monkeypatch):
    bar = Progress()
    monkeypatch.setattr(terminal, "progress_bar", lambda: bar)
    with terminal.showing() as progress:
        for what in ("reading", "writing"):
            for done in range(3):
                progress(what, done, 2)
                (task,) = bar.tasks
                assert (task.description, task.completed, task.total) == (what, done, 2)
                assert task.finished == (done == 2)
