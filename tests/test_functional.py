"""Functional sites: what is found, at every size, by whatever way a model is called."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import quanttune as qt
from quanttune.origins import Origins
from quanttune.quantization.functional import functional_sites
from quanttune.quantization.state import quantizers


def sites(model):
    """Return the functional sites of a quantized model, without what its modules hold."""
    held = ("input_quantizer", "output_quantizer", "weight_quantizer")
    names = [site.name for site in qt.summary(model).sites]
    return {name.removesuffix("_quantizer") for name in names if not name.endswith(held)}


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


class Core(nn.Module):
    """Attention in a module without children, as flash attention's wrappers are."""

    def forward(self, query, key, value, mask=None):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Products(nn.Module):
    """Attention, written in one of many ways."""

    def __init__(self, how):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.core, self.how = Core(), how

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.how == "core":
            return self.core(q, k, v)
        return self.probabilities(q, k) @ v

    def probabilities(self, q, k):
        match self.how:
            case "einsum":
                return torch.einsum("btd,bsd->bts", q, k).softmax(-1)
            case "baddbmm":
                bias = torch.zeros(len(q), q.shape[1], k.shape[1])
                return torch.baddbmm(bias, q, k.mT, alpha=0.25).softmax(-1)
            case "bmm":
                return torch.bmm(q, k.mT).softmax(-1)
            case "samples":
                return torch.stack([torch.mm(a, b.t()) for a, b in zip(q, k, strict=True)]).softmax(
                    -1
                )
        raise ValueError(self.how)


@pytest.mark.parametrize("how", ["core", "einsum", "baddbmm", "bmm", "samples"])
def test_attention_is_found_however_it_is_written(how):
    model, x = Products(how).eval(), torch.randn(2, 6, 16)
    expected = model(x)
    nearly = qt.quantize(copy.deepcopy(model), 16, coverage="full", data=[x])
    assert relative(nearly(x), expected) < 1e-3
    found = sites(nearly)
    if how == "core":
        parts = ("query", "key", "value", "score", "probability")
        assert found == {f"core.attention0_{part}" for part in parts}
    else:
        assert found == {f"product{i}_{p}" for i in (0, 1) for p in ("left", "right")} | {
            "product0_score"
        }
    assert qt.summary(nearly).integer_products == 1
    coarse = qt.quantize(copy.deepcopy(model), 4, coverage="full", data=[x])
    assert relative(coarse(x), expected) > 0.01


def test_products_that_are_rounded_are_those_by_hand():
    """einsum and matmul of the same operands: the same grids, the same numbers."""
    x = torch.randn(3, 6, 16)
    torch.manual_seed(1)
    ways = [qt.quantize(Products(how).eval(), 5, data=[x]) for how in ("einsum", "bmm")]
    ways[1].load_state_dict(ways[0].state_dict())
    torch.testing.assert_close(ways[0](x), ways[1](x), rtol=1e-5, atol=1e-6)


class Gate(nn.Module):
    """What stands between a softmax and its product."""

    def __init__(self, how):
        super().__init__()
        self.qkv, self.how = nn.Linear(8, 24), how
        self.register_buffer("heads", torch.tensor([1.0, 0.5]).view(2, 1, 1))

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        p = (q @ k.mT).softmax(-1)
        match self.how:
            case "view":
                p = p.flatten(0, 1).view(p.shape)
            case "heads":
                p = p * self.heads
            case "dropped":
                p = F.dropout(p, 0.1, self.training)
            case "sliced":  # attention with a sink
                p = F.pad((q @ k.mT), (0, 1)).softmax(-1)[..., :-1]
            case "transposed":
                return (v.mT @ p.mT).mT
        return p @ v


@pytest.mark.parametrize("how", ["plain", "view", "heads", "dropped", "sliced", "transposed"])
def test_a_softmax_is_known_behind_views_and_masks(how):
    x = torch.randn(2, 5, 8)
    model = qt.quantize(Gate(how).eval(), 8, coverage="full", data=[x])
    kinds = [quantizer.kind for quantizer in quantizers(model).values()]
    assert kinds.count("probability") == 1
    assert kinds.count("operand") == 3 + (how == "sliced") * 2  # its scores are computed twice
    default = qt.quantize(Gate(how).eval(), 8, data=[x])
    assert "probability" not in [quantizer.kind for quantizer in quantizers(default).values()]


class Biased(nn.Module):
    """Scores with something added, of any shape."""

    def __init__(self, how):
        super().__init__()
        self.f, self.how = nn.Linear(8, 8), how
        self.table = nn.Parameter(torch.randn(1, 2, 6, 6))
        self.register_buffer("mask", torch.full((6, 6), -3e38).triu(1))

    def forward(self, x, mask=None):
        h = self.f(x)
        scores = h @ h.mT
        match self.how:
            case "table":
                scores = scores + self.table * 1
            case "buffer":
                scores = scores + self.mask.expand(scores.shape)
            case "argument":
                scores = scores + mask
            case "two masks":
                scores = scores + (mask + self.mask)
        return scores.softmax(-1) @ h


@pytest.mark.parametrize("how", ["table", "buffer", "argument", "two masks"])
@pytest.mark.parametrize("calibrated", [1, 4])
def test_a_sum_that_goes_into_a_softmax_is_no_residual_at_any_size(how, calibrated):
    x = torch.randn(4, 2, 6, 8)
    mask = torch.where(torch.rand(4, 2, 6, 6) < 0.2, -3e38, 0.0)
    mask[..., 0] = 0
    given = {"mask": mask} if how in ("argument", "two masks") else {}
    some = {"x": x[:calibrated], **{k: m[:calibrated] for k, m in given.items()}}
    model = Biased(how).eval()
    expected = model(x, **given)
    q = qt.quantize(copy.deepcopy(model), 8, data=[some])
    assert not any("add" in site for site in sites(q))
    whole = q(x, **given)
    one = [q(x[i : i + 1], **{k: m[i : i + 1] for k, m in given.items()}) for i in range(4)]
    torch.testing.assert_close(torch.cat(one), whole, rtol=1e-5, atol=1e-5)
    assert relative(whole, expected) < 0.3  # what calibration did not see is clipped


class Positions(nn.Module):
    """Positions, from a parameter that is cast, a table or the input, and a sum of activations."""

    def __init__(self):
        super().__init__()
        self.pos = nn.Parameter(torch.randn(1, 4, 8))
        self.table, self.f = nn.Embedding(4, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.pos.to(x.dtype)
        x = x + self.table(torch.arange(x.shape[1]))
        return x + self.f(x)


def test_constants_are_no_activations_in_whatever_type():
    x = torch.randn(3, 4, 8)
    for size in (1, 3):
        model = qt.quantize(Positions().eval(), 8, data=[x[:size]])
        assert sites(model) == {"add0", "add1"}  # with the table, which is looked up; not with pos
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).isfinite().all()
        model(x)  # longer, or more, or other types: the same sites
        parameters = {n: p.detach() for n, p in model.named_parameters()}
        assert torch.equal(functional_call(model, parameters, (x,)), model(x))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 16)
        self.how, self.reentrant = "plain", False

    def helper(self, a, b):
        return a + F.gelu(b)

    def core(self, x):
        h = self.f(x)
        return self.helper(x, (h @ h.mT).softmax(-1) @ h)

    def forward(self, x):
        if self.how == "plain":
            return self.helper(self.core(x), self.g(x))
        inner = checkpoint(self.core, x, use_reentrant=self.reentrant)
        return self.helper(inner, self.g(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("bits", [8, 3])
def test_checkpointed_functions_have_the_gradient_of_the_plain_model(bits, reentrant):
    x = torch.randn(2, 5, 16)
    model = qt.quantize(Residual(), bits, coverage="full", data=[x])
    gradients = []
    for how in ("plain", "checkpointed"):
        model.how, model.reentrant = how, reentrant
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        y = model(leaf)
        y.square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_checkpoints_of_other_models_are_as_they_were():
    qt.quantize(Residual(), 8, data=[torch.randn(2, 5, 16)])
    other = Residual()
    x = torch.randn(2, 5, 16)
    plain = torch.autograd.grad(other(x).square().sum(), other.f.weight)[0]
    other.how = "checkpointed"
    for other.reentrant in (False, True):
        leaf = x.clone().requires_grad_()
        again = torch.autograd.grad(other(leaf).square().sum(), other.f.weight, allow_unused=True)
        if not other.reentrant:  # the other kind does not allow torch.autograd.grad
            torch.testing.assert_close(again[0], plain)
            break


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("while_quantizing", [False, True])
def test_nothing_is_left_behind_by_a_call_that_ends(error, while_quantizing):
    class Ends(nn.Module):
        ended = False

        def forward(self, x):
            if self.ended:
                raise error
            return x

    model, x = nn.Sequential(Residual(), Ends()).eval(), torch.randn(2, 5, 16)
    if not while_quantizing:
        qt.quantize(model, 4, data=[x])
        expected = model(x)
    model[1].ended = True
    with pytest.raises(error):
        qt.quantize(model, 4, data=[x]) if while_quantizing else model(x)
    assert torch._C._len_torch_function_stack() == 0
    assert torch.equal(x + x, 2 * x)
    model[1].ended = False
    if while_quantizing:
        qt.quantize(model, 4, data=[x])
    else:
        assert torch.equal(model(x), expected)


class Adapter(nn.Module):
    """What LoRA puts in the place of a Linear."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(16, 2), nn.Linear(2, 16)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_adapters_that_are_added_later_compute_in_float():
    x = torch.randn(2, 5, 16)
    model = qt.quantize(Residual().eval(), 8, data=[x])
    before = model(x).detach()
    found = sites(model)
    model.f = Adapter(model.f)
    nn.init.zeros_(model.f.up.weight)
    nn.init.zeros_(model.f.up.bias)
    after = model(x)
    assert torch.equal(after, before)
    after.sum().backward()
    assert model.f.up.weight.grad.isfinite().all()
    assert sites(model) == found


class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(self.f(x[:, t]) + h)
        return h


def test_a_line_is_one_site_however_often_it_runs():
    model = qt.quantize(Steps().eval(), 8, data=[torch.randn(2, 6, 8)])
    assert sites(model) == {"add0"}
    for steps in (1, 6, 9):
        assert model(torch.randn(3, steps, 8)).isfinite().all()


class Functional(nn.Module):
    """Weights that are used without calling the module that holds them, or are in none."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias = nn.Linear(8, 8, bias=False), nn.Parameter(torch.randn(8))
        self.own, self.last = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 2)

    def forward(self, x):
        x = F.linear(x, self.qkv.weight, bias=self.bias)
        return self.last(x @ self.own)


class Chain(nn.Module):
    """Products and sums that begin at one column, and one that two lines hold."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        a, b = self.one(x), self.two(x)
        # fmt: off
        return (a @ b.mT @ x
                @ b.mT) + a.matmul(b.mT).matmul(b).matmul(b.mT)
        # fmt: on


def test_operations_that_begin_in_one_column_are_several_sites():
    x = torch.randn(3, 4, 8)
    model = qt.quantize(Chain().eval(), 8, data=[x])
    products = {site.partition("_")[0] for site in sites(model) if site.startswith("product")}
    assert products == {f"product{i}" for i in range(6)}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    torch.compiler.reset()


def test_products_with_parameters_are_those_of_a_linear():
    x, model = torch.randn(3, 5, 8), Functional().eval()
    same = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False), copy.deepcopy(model.last))
    with torch.no_grad():
        same[0].weight.copy_(model.qkv.weight)
        same[0].bias.copy_(model.bias)
        same[1].weight.copy_(model.own.t())
    for weights in ("channel", "tensor"):
        ours, theirs = (
            qt.quantize(copy.deepcopy(m).eval(), 5, weights=weights, data=[x])
            for m in (model, same)
        )
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
        assert len(quantizers(ours)) == len(quantizers(theirs))
    assert qt.summary(ours).integer_products == 1


@pytest.mark.parametrize("make", [lambda: Products("einsum"), Functional, Residual, Steps])
def test_a_copy_and_a_file_have_the_same_sites(make, tmp_path):
    width = 8 if make in (Functional, Steps) else 16
    x = torch.randn(2, 6, width)
    model = qt.quantize(make().eval(), 5, coverage="full", data=[x])
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    qt.save(model, tmp_path / "model.safetensors")
    assert torch.equal(qt.load(make().eval(), tmp_path / "model.safetensors")(x), expected)


def test_threads_call_one_model_at_once():
    x = torch.randn(8, 5, 16)
    model = qt.quantize(Residual().eval(), 6, coverage="full", data=[x])
    expected = model(x)
    found = {}

    def work(i):
        found[i] = torch.cat([model(x[j : j + 1]) for j in range(8)])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found.values():
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)
    assert len(found) == 4


def test_a_class_keeps_its_name_and_its_signature():
    import inspect

    model = qt.quantize(Residual().eval(), 8, data=[torch.randn(2, 5, 16)])
    assert isinstance(model, Residual)
    assert type(model).__qualname__ == Residual.__qualname__
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    again = type(model)()  # such as transformers' from_pretrained of a model's own class
    assert again(torch.randn(2, 5, 16)).isfinite().all()


@pytest.mark.parametrize("padded", [False, True])
def test_what_calibrators_compute_is_not_followed(monkeypatch, padded):
    calls = []

    def count(mode):
        meet = mode.__torch_function__
        monkeypatch.setattr(
            mode, "__torch_function__", lambda *args: calls.append(args[1]) or meet(*args)
        )

    count(functional_sites._Mode)
    count(Origins)
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2]) if padded else None

    def operations(calibrator):
        calls.clear()
        qt.quantize(Products("bmm"), calibrator=calibrator, data=[x], mask=lambda *_: mask)
        return len(calls)

    # a percentile takes more operations than an extreme value: were they followed, it would show
    assert operations("percentile") == operations("kl") == operations("minmax") > 0


class AddsBranch(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class AddsEach(nn.Module):
    """As VitDet's bottleneck of transformers: every child is a layer."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        for part in self.children():
            x = x + part(x)
        return x


class AddsNamed(nn.ModuleDict):
    def __init__(self, first, second):
        super().__init__({"first": first, "second": second})

    def forward(self, x):
        first, second = (part for _, part in self.items())
        return x + second(first(x)) if len(self) == 2 else None


class Spelled(nn.Module):
    """What these compute, by names."""

    def __init__(self, first, second, each):
        super().__init__()
        self.first, self.second, self.each = first, second, each

    def forward(self, x):
        if not self.each:
            return x + self.second(self.first(x))
        for part in (self.first, self.second):
            x = x + part(x)
        return x


@pytest.mark.parametrize("kind", [AddsBranch, AddsEach, AddsNamed])
def test_a_forward_through_the_children_meets_no_quantizers(kind, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, 4, 8)
    parts = [nn.Linear(8, 8), nn.Linear(8, 8)]
    original = nn.Sequential(kind(*parts), nn.Linear(8, 4)).eval()
    spelled = nn.Sequential(Spelled(*parts, each=kind is AddsEach), original[1])
    model, expected = (
        qt.quantize(copy.deepcopy(m), data=[x[:16], x[16:]]) for m in (original, spelled)
    )
    assert torch.equal(model(x), expected(x))
    assert torch.equal(copy.deepcopy(model)(x), expected(x))
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected(x))
    torch.compiler.reset()
    sums = [name for name, _ in model.named_modules() if "add" in name]
    assert len(sums) == 1
    model.train()  # what goes through all children from outside meets them
    assert all(model.get_submodule(name).training for name in sums)
    qt.save(model.eval(), tmp_path / "model.safetensors")
    assert torch.equal(qt.load(original, tmp_path / "model.safetensors")(x), expected(x))
