"""`verify`: right files pass, wrong ones fail with what is wrong; counts against numpy."""

import copy
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_files
import pytest
import torch
import transformers
from models import Example, Shared, shallow
from onnx import helper, numpy_helper
from torch import nn

import quanttune as qt
from quanttune.deploy import external_data
from quanttune.deploy.onnx_model import OnnxModel
from quanttune.deploy.verification.agreement import Distance, Distances, Layer, compare_codes
from quanttune.deploy.verification.problems import wrong_output
from quanttune.deploy.verification.result import Output
from quanttune.deploy.verification.simulated_codes import NOISE, perturbed
from quanttune.quantization.state import quantizers

CASES = [
    ("vit", {"bits": 8}, "uint8"),
    ("vit", {"bits": 6}, "int8"),
    ("bert", {"bits": 6, "coverage": "full"}, "uint8"),
    ("shared", {"bits": 6, "symmetric": False, "coverage": "full"}, "int8"),
    ("shared", {"bits": 8}, "uint8"),
]
FC1 = "blocks.0.mlp.fc1"


def shared():
    return Example(Shared().eval(), torch.randn(16, 8), torch.zeros(16).long(), ("head",))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return what makes a model, its inputs and its file; each is made once."""
    done = {}

    def make(name="vit", options=None, act_dtype="uint8"):
        options = options or {"bits": 8}
        key = repr((name, options, act_dtype))
        if key not in done:
            torch.manual_seed(0)
            example = shared() if name == "shared" else shallow(name)
            qt.quantize(example.model, data=[example.inputs], **options)
            path = tmp_path_factory.mktemp(name) / "model.onnx"
            qt.export_onnx(example.model, example.inputs, path, act_dtype=act_dtype)
            done[key] = example.model, example.inputs, path
        return done[key]

    return make


@pytest.fixture
def changed(made, tmp_path):
    """Return what writes a file with something else in it: change(file) is given a ModelProto."""

    def write(change, *args):
        model, inputs, path = made(*args)
        file = onnx.load(path)
        change(file)
        onnx.save(file, tmp_path / "changed.onnx")
        return model, inputs, tmp_path / "changed.onnx"

    return write


def setting(name, number, index=0):
    """Change one number of a stored tensor."""

    def change(file):
        (tensor,) = (t for t in file.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[index] = number(array.flat[index])
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


def renaming(name):
    """Give a stored tensor a name that tells nothing."""

    def change(file):
        for tensor in file.graph.initializer:
            tensor.name = "constant" if tensor.name == name else tensor.name
        for node in file.graph.node:
            for i, value in enumerate(node.input):
                node.input[i] = "constant" if value == name else value

    return change


def both(*changes):
    def change(file):
        for one in changes:
            one(file)

    return change


@torch.no_grad()
def simulated_codes(model, inputs, center):
    """Return the codes of all calls by site, in numpy, from what goes in."""
    seen = {}
    handles = [
        quantizer.register_forward_pre_hook(
            lambda _, args, site=site: seen.setdefault(site, []).append(args[0].numpy().copy())
        )
        for site, quantizer in quantizers(model).items()
    ]
    model(inputs)
    for handle in handles:
        handle.remove()
    codes = {}
    for site, tensors in seen.items():
        quantizer = quantizers(model)[site]
        half = 2 ** (quantizer.bits - 1)
        for x in tensors:
            rounded = np.rint(x / quantizer.scale.numpy()) + quantizer.zero
            codes.setdefault(site, []).append(np.clip(rounded, -half, half - 1) + center)
    return codes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_right_file_passes(case, made):
    model, inputs, path = made(*case)
    found = qt.verify(path, model, [inputs, (inputs[:3], "labels")])
    assert found.problems == ()
    assert found.passed
    calls = simulated_codes(model, inputs, 0)
    there = onnx_files.sites(onnx.load(path))
    names = [layer.site + (f".codes_{layer.call}" if layer.call else "") for layer in found.layers]
    assert names == there
    assert len(there) + len(found.merged) == sum(map(len, calls.values()))
    for layer in found.layers:
        assert layer.values == calls[layer.site][layer.call].size
        assert layer.beyond_one == 0
    (output,) = found.outputs
    assert output.file.mean <= 2 * output.noise.mean + 1e-5 * output.magnitude
    assert "the file computes what the model simulates" in str(found)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_shares_are_those_that_numpy_counts(case, changed):
    """A bias moves many codes of its site, and some go beyond 1."""
    *_, act_dtype = case
    model, inputs, path = changed(setting(f"{FC1}.bias", lambda x: x + 0.5, 7), *case)
    found = qt.verify(path, model, [inputs])
    codes = simulated_codes(model, inputs, 128 if act_dtype == "uint8" else 0)
    file = onnx_files.layers(path)
    feeds = {f"{site}.fed": codes[site][0].astype(act_dtype) for site in onnx_files.sites(file)}
    outputs = onnx_files.run(file, {"x": inputs, **feeds})
    wrong = []
    for layer in found.layers:
        own = outputs[layer.site + onnx_files.CODES].astype(int)
        difference = np.abs(own - codes[layer.site][0])
        expected = (difference > 0).mean(), (difference > 1).mean(), difference.max()
        assert (layer.differ, layer.beyond_one, layer.largest) == expected
        wrong += [layer.site] if layer.beyond_one else []
    assert wrong == [f"{FC1}.output_quantizer"]
    assert f"not those of the model: {FC1}.bias" in found.problems[0]
    assert f"{FC1}.output_quantizer is the first layer that disagrees" in found.problems[1]
    assert not found.passed
    assert all(problem in str(found) for problem in found.problems)


def test_a_wrong_scale_is_named(changed):
    site = f"{FC1}.output_quantizer"
    model, inputs, path = changed(setting(f"{site}.scale", lambda x: 1.25 * x))
    found = qt.verify(path, model, [inputs])
    assert [problem.startswith(site) for problem in found.problems] == [True, False, True]
    own = np.float32(quantizers(model)[site].scale)
    expected = f"the scale is {own * np.float32(1.25):.8g} in the file, {own:.8g} in the model"
    assert found.problems[0] == f"{site}: {expected}"
    (layer,) = [problem for problem in found.problems if "first layer" in problem]
    assert site in layer


def test_a_wrong_scale_on_the_way_back_is_named(changed):
    """That of DequantizeLinear alone."""
    site = f"{FC1}.output_quantizer"

    def change(file):
        file.graph.initializer.append(numpy_helper.from_array(np.float32(1), "other"))
        for node in file.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] == f"{site}.codes":
                node.input[1] = "other"

    model, inputs, path = changed(change)
    found = qt.verify(path, model, [inputs])
    assert found.problems[0].startswith(f"{site}: the scale is 1 in the file")
    assert "blocks.0.mlp.fc2.input_quantizer is the first layer" in found.problems[1]


def test_a_wrong_zero_point_is_named(changed):
    site = f"{FC1}.output_quantizer"

    def change(file):
        file.graph.initializer.append(numpy_helper.from_array(np.uint8(127), "other"))
        for node in file.graph.node:
            if f"{site}.codes" in (*node.input, *node.output):
                node.input[2] = "other"

    model, inputs, path = changed(change)
    problems = qt.verify(path, model, [inputs]).problems
    assert problems[0] == f"{site}: the zero point is 127 in the file, 128 in the model"


def test_a_weight_that_has_no_name_is_found_by_the_layer_behind_it(changed):
    weight = f"{FC1}.weight_quantizer.codes"
    turn = [setting(weight, lambda code: 255 - code, i) for i in range(0, 2000, 7)]
    model, inputs, path = changed(both(*turn, renaming(weight)))
    found = qt.verify(path, model, [inputs])
    assert f"{FC1}.output_quantizer is the first layer that disagrees" in found.problems[0]


def test_a_site_that_is_not_in_the_file_is_named(changed):
    """What reads its codes reads those of the site before it, and its node is gone."""
    gone = "shared.output_quantizer.codes_1"

    def change(file):
        for node in list(file.graph.node):
            if gone in node.output:
                file.graph.node.remove(node)
            elif gone in node.input:
                node.input[0] = "shared.input_quantizer.codes_1"

    model, inputs, path = changed(change, "shared")
    assert f"the file does not round at {gone}" in qt.verify(path, model, [inputs]).problems


def test_a_site_that_no_output_needs_is_no_problem(tmp_path):
    class Pooled(Shared):
        def forward(self, x):
            self.pooler(x)
            return super().forward(x)

    torch.manual_seed(0)
    model, inputs = Pooled().eval(), torch.randn(6, 8)
    model.pooler = nn.Linear(8, 8)
    qt.quantize(model, weight_bits=7, data=[inputs])
    qt.export_onnx(model, inputs, tmp_path / "model.onnx")
    found = qt.verify(tmp_path / "model.onnx", model, [inputs])
    assert found.problems == ()
    assert set(found.unused) == {f"pooler.{end}_quantizer.codes" for end in ("input", "output")}
    assert "2 more round what no output needs" in str(found)


def test_an_output_that_no_code_decides_is_compared(changed):
    change = both(setting("head.bias", lambda x: x + 0.3), renaming("head.bias"))
    model, inputs, path = changed(change, "shared", {"coverage": "linear"})
    problems = qt.verify(path, model, [inputs]).problems
    assert "output: on the same codes before it it differs by 0.3" in problems[0]
    assert "output: the file's is 0.1 from the simulation's in the mean" in problems[1]


def test_a_file_that_is_wrong_for_a_later_batch_fails(changed):
    """Its last layer adds the batch size less that of the first, so that the layers agree."""

    def change(file):
        (output,) = file.graph.output
        file.graph.node[-1].output[0] = "before"
        for name, value in (("first", np.float32(16)), ("none", np.array([0]))):
            file.graph.initializer.append(numpy_helper.from_array(value, name))
        file.graph.node.extend(
            [
                helper.make_node("Shape", ["before"], ["shape"]),
                helper.make_node("Gather", ["shape", "none"], ["rows"]),
                helper.make_node("Cast", ["rows"], ["float"], to=1),
                helper.make_node("Sub", ["first", "float"], ["less"]),
                helper.make_node("Add", ["before", "less"], [output.name]),
            ]
        )

    model, inputs, path = changed(change, "shared")
    assert qt.verify(path, model, [inputs]).passed
    (problem,) = qt.verify(path, model, [inputs, inputs[:3]]).problems
    expected = 13 * 3 / 19  # of the rows of both
    assert f"output: the file's is {expected:.3g} from the simulation's" in problem


def test_wide_sites_are_computed_in_float_and_not_compared(made):
    options = {"bits": 8, "overrides": {"shared.*": {"bits": 12}}}
    model, inputs, path = made("shared", options)
    found = qt.verify(path, model, [inputs])
    assert found.passed
    assert set(found.floats) == {"shared.input_quantizer", "shared.output_quantizer"}
    assert not any(layer.site in found.floats for layer in found.layers)
    assert "2 of more than 8 bits are computed in float" in str(found)
    model, inputs, path = made("shared", {"bits": 12})
    found = qt.verify(path, model, [inputs])
    assert found.passed
    assert found.layers == ()


@pytest.mark.parametrize("share", [0, 0.01, 0.2, 0.5, 0.9, 0.999, 0.99999])
def test_a_truncated_file_is_refused(share, made, tmp_path):
    model, inputs, path = made("shared")
    data = path.read_bytes()
    part = tmp_path / "part.onnx"
    part.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"part.onnx .*not? .*whole"):
        qt.verify(part, model, [inputs])


def test_tensors_beside_the_file_are_read_and_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(external_data, "LARGEST", 100)
    inputs, path = torch.randn(4, 8), tmp_path / "model.onnx"
    model = qt.quantize(nn.Sequential(nn.Linear(8, 64)), weight_bits=7, data=[inputs])
    qt.export_onnx(model, inputs, path)
    assert qt.verify(path, model, [inputs]).passed
    (beside,) = external_data.tensor_files(path)
    beside.write_bytes(beside.read_bytes()[:-40])
    for _ in ("truncated", "missing"):
        with pytest.raises(ValueError, match=r"model.onnx is no whole ONNX file"):
            qt.verify(path, model, [inputs])
        beside.unlink(missing_ok=True)


def other_bits(example):
    return qt.quantize(example.model, 7, data=[example.inputs])


def other_widths(example):
    options = {"overrides": {"head": {"bits": 6}}}
    return qt.quantize(example.model, data=[example.inputs], **options)


def another(example):
    return qt.quantize(nn.Sequential(nn.Linear(8, 8)), data=[example.inputs])


def wider(example):
    model = example.model
    model.shared = model.alias = nn.Linear(8, 8)
    model.head = nn.Linear(8, 4)
    return qt.quantize(model, data=[example.inputs])


OTHERS = {
    "is of another model: bits is 8 in the file, 7 in the model": other_bits,
    "is of another model: overrides is {} in the file, {'head'": other_widths,
    "is of another model: it has no site 0.weight_quantizer": another,
    "is of another model: head.bias is [3] in the file, [4] in the model": wider,
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_file_of_another_model_is_refused(message, made):
    *_, path = made("shared")
    example = shared()
    with pytest.raises(ValueError, match=re.escape(message)):
        qt.verify(path, OTHERS[message](example), [example.inputs])


def test_a_file_of_other_weights_fails(made):
    model, inputs, path = made("shared")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm.weight[2] += 1
    found = qt.verify(path, other, [inputs])
    assert found.problems[0].endswith("tensors are not those of the model: norm.weight")
    assert "norm.output_quantizer is the first layer that disagrees" in found.problems[1]


def stranger(path):
    node = helper.make_node("Relu", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, 1, [2]) for name in "xy")
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y])), path)


def unreadable(path):
    stranger(path)
    file = onnx.load(path)
    helper.set_model_props(file, {"quantization_config": "{"})
    onnx.save(file, path)


def endless(path):
    stranger(path)
    file = onnx.load(path)
    helper.set_model_props(file, {"quantization_config": "[" * 100_000})
    onnx.save(file, path)


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (endless, ValueError, "x.onnx: the quantization is no JSON: maximum recursion"),
        (lambda path: None, FileNotFoundError, "there is no file .*x.onnx"),
        (lambda path: path.write_text("text"), ValueError, "x.onnx is no whole ONNX file"),
        (stranger, ValueError, "was not written by export_onnx"),
        (unreadable, ValueError, "x.onnx: the quantization is no JSON"),
    ],
)
def test_what_is_no_file_of_ours_is_refused(write, error, message, made, tmp_path):
    model, inputs, _ = made("shared")
    write(tmp_path / "x.onnx")
    with pytest.raises(error, match=message):
        qt.verify(tmp_path / "x.onnx", model, [inputs])


def test_what_cannot_be_compared_is_refused(made):
    model, inputs, path = made("shared")
    with pytest.raises(ValueError, match="data is empty: verify needs at least one batch"):
        qt.verify(path, model, [])
    with pytest.raises(ValueError, match="Shared is not quantized"):
        qt.verify(path, Shared(), [inputs])
    with pytest.raises(ValueError, match="ONNX Runtime refuses the inputs"):
        # the file takes (batch, 8), and the model anything before 8
        qt.verify(path, model, [inputs.view(2, 8, 8)])


def test_what_fails_while_it_runs_is_refused(tmp_path):
    """ONNX Runtime has a kind of error of its own for that."""
    shape = numpy_helper.from_array(np.array([3, -1]), "shape")
    x, y = (helper.make_tensor_value_info(name, 1, ["n"]) for name in "xy")
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    y.type.tensor_type.shape.dim.add()
    file = helper.make_model(
        helper.make_graph([node], "g", [x], [y], [shape]),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    assert OnnxModel(file)(torch.arange(6.0))["y"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"ONNX Runtime refuses the inputs: .*Reshape"):
        OnnxModel(file)(torch.arange(7.0))


@pytest.mark.parametrize(
    ("heads", "mask", "batches"),
    [(1, True, [(1, 5), (3, 7, 2)]), (2, False, [(1, 1), (3, 12)])],
)
def test_keys_that_a_group_shares_are_compared(heads, mask, batches, tmp_path):
    """The file repeats them before it rounds, and the simulation where padding is masked."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=heads, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()

    def batch(rows, tokens, padding=0):
        found = {"input_ids": torch.randint(60, (rows, tokens))}
        if mask:
            found["attention_mask"] = torch.ones_like(found["input_ids"])
            found["attention_mask"][0, tokens - padding :] = 0
        return found

    qt.quantize(model, 8, weight_bits=7, coverage="full", data=[batch(4, 9)])
    path = tmp_path / "model.onnx"
    qt.export_onnx(model, batch(2, 6), path, dynamic={0: "batch", 1: "tokens"})
    for sizes in batches:
        found = qt.verify(path, model, [batch(*sizes)])
        assert found.problems == ()
        (key,) = (x for x in found.layers if x.site.endswith("attention0_key_quantizer"))
        assert key.values == sizes[0] * 4 * sizes[1] * 4
        assert key.differ < 0.05
    key = quantizers(model)["model.layers.0.self_attn.attention0_key_quantizer"]
    key.scale.mul_(1.25)
    problems = qt.verify(path, model, [batch(2, 6)]).problems
    assert "attention0_key_quantizer: the scale is" in problems[0]
    assert any("is the first layer that disagrees" in problem for problem in problems)


def test_the_model_is_left_as_it_was(made):
    model, inputs, path = made("shared")
    model = copy.deepcopy(model).train()
    before = Counter(len(module._forward_hooks) for module in model.modules())
    qt.verify(path, model, [inputs])
    assert all(module.training for module in model.modules())
    assert Counter(len(module._forward_hooks) for module in model.modules()) == before
    assert not any(len(q._forward_pre_hooks) for q in quantizers(model).values())


def test_noise_is_of_what_a_grid_covers_and_flips_what_layers_did(made):
    model, inputs, path = made("shared")
    quantizer = quantizers(model)["shared.input_quantizer"]
    x = torch.rand(200_000) * quantizer.absmax
    (layer,) = (
        one
        for one in qt.verify(path, model, [inputs]).layers
        if one.name == "shared.input_quantizer, call 1"
    )  # fmt: skip
    with torch.no_grad():
        expected = quantizer(x)
        for share in (0.0, 0.01, 0.5):
            with perturbed(model, 1, [replace(layer, values=1000, differ=share)]):
                flips = (quantizer(x) != expected).double().mean().item()
            # noise of s steps moves 0.8 s of them over the border
            steps = NOISE * 128 + (2.5 * share if share < 0.1 else 0)  # half is no noise
            assert flips == pytest.approx(math.sqrt(2 / math.pi) * steps, rel=0.1)


@pytest.mark.parametrize(
    ("values", "differ", "beyond_one", "agrees"),
    [
        (10_000, 0.05, 0.001, True),
        (10_000, 0.0501, 0.0, False),
        (10_000, 0.005, 0.0011, False),
        (20, 0.15, 0.0, True),
        (20, 0.2, 0.0, False),
        (0, 0.0, 0.0, True),
    ],
)
def test_what_a_layer_may_differ_by(values, differ, beyond_one, agrees):
    assert Layer("site", 0, values, differ, beyond_one, 1).agrees == agrees


@pytest.mark.parametrize(("dtype", "lowest"), [(torch.uint8, 0), (torch.int8, -128)])
def test_codes_are_compared_as_numbers(dtype, lowest):
    """By hand: differences of 255, 0, 1, 2 and 0."""
    file, simulation = torch.tensor([[0, 255, 7, 9, 1], [255, 255, 8, 7, 1]]) + lowest
    layer = compare_codes("site", 2, file.to(dtype), simulation.to(dtype))
    assert layer == Layer("site", 2, 5, 0.6, 0.4, 255)
    assert layer.name == "site, call 2"


def test_distances_are_those_of_all_batches():
    first, second = torch.tensor([[0.0, 1.0], [3.0, 2.0]]), torch.tensor([[5.0, 4.0]])
    distances = Distances()
    distances.add(torch.tensor([[4.0, 6.0]]), second)
    distances.add(first + torch.tensor([0.5, -0.25]), first)
    found = distances.distance()
    assert (found.mean, found.largest, found.argmax) == (4.5 / 6, 2.0, 2 / 3)
    distances.add(second * math.nan, second)
    assert math.isnan(distances.distance().mean)
    assert math.isnan(distances.distance().largest)
    scores = Distances()
    scores.add(torch.ones(3, 1), torch.zeros(3, 1))
    assert scores.distance().argmax is None


def test_an_output_of_nan_is_a_problem():
    right = Distance(0.0, 0.0, None)
    assert not list(wrong_output(Output("y", 1.0, right, right, right)))
    wrong = Distance(math.nan, math.nan, None)
    same, mean = wrong_output(Output("y", 1.0, file=wrong, noise=right, same_codes=wrong))
    assert "differs by nan" in same
    assert "is nan from the simulation's" in mean


def test_batches_may_hold_several_inputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, a, b):
            return self.one(a) @ self.two(b).mT

    batch = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.zeros(3)  # with labels
    model = qt.quantize(Two().eval(), data=[batch])
    qt.export_onnx(model, batch, tmp_path / "model.onnx")
    found = qt.verify(tmp_path / "model.onnx", model, [batch, batch[:2]])
    assert found.passed
    assert found.outputs[0].file.mean < 1e-6
