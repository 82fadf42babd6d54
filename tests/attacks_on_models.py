"""Models that nobody wrote: graphs of Linear, norms, attention and sums; and one, for long."""

import tempfile
from functools import cache
from pathlib import Path

import torch
from attacks_on_files import EXAMPLE, Block, bits_of, state
from attacks_on_work import check_nothing_is_left
from hypothesis import strategies as st
from memory import resident
from oracle import Oracle
from torch import nn
from torch.nn import functional as F

import quanttune as qt

WIDTH, HEADS = 8, 2


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


class Attention(nn.Module):
    """Attention by torch's function, or spelled out."""

    def __init__(self, spelled_out):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.spelled_out = spelled_out

    def forward(self, x):
        parts = self.qkv(x).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0)
        q, k, v = (part.transpose(1, 2) for part in parts)
        if self.spelled_out:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            mixed = scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(-2))


MAKERS = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "gelu": nn.GELU,
    "attention": lambda: Attention(spelled_out=False),
    "spelled out": lambda: Attention(spelled_out=True),
    "feed forward": lambda: nn.Sequential(
        nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)
    ),
    "sum": Sum,
}


class Graph(nn.Module):
    """Nodes that take what earlier ones give; sums in a line of this forward, or in a module.

    What no node takes is added up at the end: the loss of tuning reaches what a gradient reaches.
    """

    def __init__(self, nodes, sums_inline):
        super().__init__()
        self.nodes, self.sums_inline = nodes, sums_inline
        self.made = nn.ModuleList(MAKERS[kind]() for kind, *_ in nodes)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        values, left = [x], {0}
        for (kind, *back), module in zip(self.nodes, self.made, strict=True):
            taken = [at % len(values) for at in (back if kind == "sum" else back[:1])]
            left = left - {*taken} | {len(values)}
            arguments = [values[at] for at in taken]
            inline = kind == "sum" and self.sums_inline
            values.append(arguments[0] + arguments[1] if inline else module(*arguments))
        *others, last = [values[at] for at in sorted(left)]
        for other in others:
            last = last + other
        return self.head(last)


# a node takes the newest value most often
BACK = st.one_of(st.just(-1), st.integers(-3, -1))
NODES = st.lists(st.tuples(st.sampled_from(sorted(MAKERS)), BACK, BACK), min_size=1, max_size=8)


def draw_graph(data):
    """Return what makes a model, the same each time."""
    nodes = data.draw(NODES, label="nodes")
    inline, seed = data.draw(st.booleans(), label="inline"), data.draw(st.integers(0, 2**31))

    def make():
        torch.manual_seed(seed)
        return Graph(nodes, inline).eval()

    return make, torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def attack_made_model(data):
    """A made model is tuned as by plain PyTorch; quantized, saved and loaded it is the same."""
    make, x = draw_graph(data)
    model = make()
    check_tuned(model, x, data.draw(st.sampled_from([0.0, 0.3, 1.0]), label="alpha"))
    bits = data.draw(st.sampled_from([4, 8, 16]), label="bits")
    coverage = data.draw(st.sampled_from(["linear", "full", "full_no_softmax"]), label="coverage")
    with torch.no_grad():
        exact = model(x)
        qt.quantize(model, bits, coverage=coverage, data=[x])
        answer = model(x)
        assert answer.isfinite().all()
        if bits == 16:
            assert (answer - exact).norm() <= 1e-2 * exact.norm()
        for rows in (x[:1], x[:, :2]):
            assert model(rows).isfinite().all()
        with tempfile.TemporaryDirectory() as folder:
            qt.save(model, Path(folder) / "m")
            loaded = qt.load(make(), Path(folder) / "m")
        assert torch.equal(loaded(x), answer)
        assert bits_of(loaded.state_dict()) == bits_of(model.state_dict())


def check_tuned(model, x, alpha):
    """Compare a step of tuning with one by plain hooks and autograd, in float64."""
    before = state(model.train())
    with Oracle(model, ["head"]) as oracle:
        oracle.batch = len(x)
        loss = oracle.combine(model(x).square().mean(), alpha)
        loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    tuner = qt.attach(model, alpha, "constant")
    found = tuner.combine(model(x).square().mean())
    found.backward()
    tuner.detach()
    torch.testing.assert_close(found.double(), loss.double(), rtol=1e-5, atol=1e-12)
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    largest = max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        assert (actual[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * largest, name
    model.zero_grad()
    assert state(model) == before
    model.eval()


def attack_made_export(data):
    """The ONNX file of a made model is what was simulated."""
    make, x = draw_graph(data)
    model = qt.quantize(make(), data.draw(st.sampled_from([4, 8]), label="bits"), data=[x])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        qt.export_onnx(model, x, path)
        found = qt.verify(path, model, [x, x[:2]])
        assert found.passed, found


# -------------------------------------------------------------------------------------------- soak

STEPS = 1000  # of a case; those of a seed go on in one process


@cache
def soaked():
    """Return a tuned model, a quantized one, and what a step gives of either."""
    torch.manual_seed(0)
    model, rounded = Block().train(), Block().eval()
    tuner = qt.attach(model, 0.5, "constant")
    qt.quantize(rounded, 4, data=[EXAMPLE])
    found = step(model, tuner, rounded)
    for number in range(200):
        step(model, tuner, rounded)
        if number % 100 == 0:  # what the first error loads stays
            stumble(model, tuner, rounded)
    return model, tuner, rounded, found, resident()


def step(model, tuner, rounded):
    loss = tuner.combine(model(EXAMPLE).square().mean())
    loss.backward()
    grads = bits_of({name: p.grad for name, p in model.named_parameters()})
    model.zero_grad()
    return loss.item(), grads, rounded(EXAMPLE).tolist()


def stumble(model, tuner, rounded):
    """Meet an error, a forward whose backward never comes, and a tuner that comes and goes."""
    for one in (model, rounded):
        try:
            one(EXAMPLE[..., :5])
        except RuntimeError:
            continue
        raise AssertionError("5 channels went through")
    tuner.combine(model(EXAMPLE).sum())
    qt.attach(Block(), 0.5, "constant").detach()


def attack_soak(_, steps=STEPS):
    """Thousands of steps in one process, with a stumble now and then: the same bits each time, and
    no memory that grows.
    """
    model, tuner, rounded, expected, memory = soaked()
    before = state(model), state(rounded)
    for number in range(steps):
        assert step(model, tuner, rounded) == expected
        if number % 100 == 0:
            stumble(model, tuner, rounded)
    assert (state(model), state(rounded)) == before
    check_nothing_is_left()
    assert resident() - memory < 8 * 2**20
    return steps


ON_MODELS = {
    "made_model": attack_made_model, "made_export": attack_made_export, "soak": attack_soak,
}  # fmt: skip
