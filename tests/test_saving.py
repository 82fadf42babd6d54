"""A quantized model that is saved and loaded computes the same bits, and nothing else is loaded."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from models import CLASSES, MODELS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import run
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import quanttune as qt
from quanttune.quantization.requantization import requantize
from quanttune.quantization.saving.description import describe
from quanttune.quantization.saving.hf_config import update_hf_config
from quanttune.quantization.simulation import quantizers

OPTIONS = {
    "default": {},
    "W4A8 per tensor": {"weight_bits": 4, "weights": "tensor", "coverage": "full"},
    "without residual": {"bits": 6, "residual": False, "calibrator": "percentile"},
    "linear": {"coverage": "linear"},
    "dynamic": {"calibrator": "dynamic"},
    "affine": {"bits": 6, "symmetric": False, "calibrator": "omse", "coverage": "full"},
    "affine with overrides": {
        "symmetric": False,
        "overrides": {"*embed*": None, "*.0.*": {"bits": 5}, "*0_[ql]*": None},
    },
    "a calibrator of one's own": {"calibrator": lambda: Everything()},
    "overrides": {
        "coverage": "full",
        "overrides": {"*embed*": None, "*.0.*": {"bits": 5}, "*0_[ql]*": None},
    },
}


class Everything:
    """Cover a range that does not depend on the data."""

    def update(self, x):
        pass

    def absmax(self):
        return torch.tensor(3.0)


def pair(name, **options):
    """Return a quantized example, and a float model of other weights."""
    example = MODELS[name]()
    data = None if options.get("calibrator") == "dynamic" else [example.inputs]
    qt.quantize(example.model.eval(), data=data, **options)
    return example, MODELS[name]().model.eval()


def assert_same(example, loaded):
    assert torch.equal(example.logits(loaded), example.logits())
    assert describe(loaded) == describe(example.model)
    by_name = {site.name: site for site in qt.summary(example.model).sites}
    assert {site.name: site for site in qt.summary(loaded).sites} == by_name


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_the_same_bits(name, options, tmp_path):
    example, other = pair(name, **OPTIONS[options])
    assert not torch.equal(example.logits(other), example.logits())
    qt.save(example.model, tmp_path / "model.safetensors")
    assert qt.load(other, tmp_path / "model.safetensors") is other
    assert_same(example, other)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["bert", "opt"])
def test_from_pretrained_gives_the_same_bits(name, options, tmp_path):
    example, _ = pair(name, **OPTIONS[options])
    example.logits()  # a dynamic model finds its functional sites when it runs
    update_hf_config(example.model)
    example.model.save_pretrained(tmp_path)
    loaded = type(example.model).from_pretrained(tmp_path)
    assert_same(example, loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert_same(example, type(loaded).from_pretrained(tmp_path / "again"))


def test_a_loaded_model_says_what_it_is_to_from_pretrained(tmp_path):
    example, other = pair("bert")
    qt.save(example.model, tmp_path / "model.safetensors")
    qt.load(other, tmp_path / "model.safetensors").save_pretrained(tmp_path / "folder")
    assert_same(example, type(other).from_pretrained(tmp_path / "folder"))


FRESH = """
import torch, transformers
import quanttune.quantization.pretrained
folder = {folder!r}
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
expected = torch.load(folder + "/logits.pt", weights_only=True)
print(torch.equal(model(torch.arange(2, 9)[None]).logits, expected))
"""


def test_another_process_needs_one_import(tmp_path):
    example, _ = pair("opt")
    example.model.save_pretrained(tmp_path)
    logits = example.model(torch.arange(2, 9)[None]).logits.detach()
    torch.save(logits, tmp_path / "logits.pt")
    assert run(FRESH.format(folder=str(tmp_path)), tmp_path) == ["True"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_half_precision_keeps_the_scales_in_float32(symmetric, tmp_path):
    example, _ = pair("bert", symmetric=symmetric)
    example.model.save_pretrained(tmp_path)
    loaded = type(example.model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    scales = {name: q.scale for name, q in quantizers(example.model).items()}
    assert all(torch.equal(q.scale, scales[name]) for name, q in quantizers(loaded).items())
    zeros = {name: q.zero for name, q in quantizers(example.model).items()}
    assert {name: q.zero for name, q in quantizers(loaded).items()} == zeros
    assert example.logits(loaded).dtype == torch.bfloat16


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_loaded_model_gets_another_width_from_its_ranges(symmetric, tmp_path):
    example, other = pair("vit", symmetric=symmetric)
    qt.save(example.model, tmp_path / "model.safetensors")
    qt.load(other, tmp_path / "model.safetensors")
    for model in (example.model, other):
        requantize(model, 5, "tensor")
    assert torch.equal(example.logits(other), example.logits())
    qt.save(example.model, tmp_path / "model.safetensors")
    third = qt.load(MODELS["vit"]().model.eval(), tmp_path / "model.safetensors")
    assert_same(example, third)


def test_grids_that_were_changed_one_by_one_are_kept(tmp_path):
    example, other = pair("vit")
    quantizers(example.model)["blocks.0.norm1.input_quantizer"].set_bits(3)
    example.model.blocks[0].mlp.fc1.weight_quantizer.bits = 3
    example.model.blocks[0].mlp.fc2.weight_quantizer.axis = None
    qt.save(example.model, tmp_path / "model.safetensors")
    assert_same(example, qt.load(other, tmp_path / "model.safetensors"))


def test_a_loaded_model_can_be_trained(tmp_path):
    example, other = pair("vit")
    qt.save(example.model, tmp_path / "model.safetensors")
    qt.load(other, tmp_path / "model.safetensors")
    example.task_loss(other).backward()
    assert all(p.grad is not None for p in other.parameters() if p.requires_grad)


def test_sites_that_calibration_never_reached_stay_errors(tmp_path):
    class Bypassing(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.warns(UserWarning, match="were not reached"):
        model = qt.quantize(Bypassing(), data=[torch.randn(2, 4)])
    qt.save(model, tmp_path / "model.safetensors")
    loaded = qt.load(Bypassing(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(torch.ones(2, 4)), model(torch.ones(2, 4)))
    with pytest.raises(RuntimeError, match="never reached during calibration"):
        loaded.bypassed(torch.ones(2, 4))


def test_a_site_that_appears_after_loading_is_an_error(tmp_path):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.twice = nn.Linear(4, 4), False

        def forward(self, x):
            return self.proj(x) + x if self.twice else self.proj(x)

    x = torch.randn(2, 4)
    qt.save(qt.quantize(Sometimes(), data=[x]), tmp_path / "model.safetensors")
    loaded = qt.load(Sometimes(), tmp_path / "model.safetensors")
    loaded.twice = True
    with pytest.raises(
        RuntimeError, match=r"adds activations at .*forward\+1:19-35, which was never reached"
    ):
        loaded(x)


def test_the_fields_are_those_of_compressed_tensors():
    model = qt.quantize(nn.Sequential(nn.Linear(6, 5)), 8, weight_bits=4, data=[torch.randn(7, 6)])
    activation = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"}
    activation |= {"dynamic": False, "observer": "minmax"}
    weight = {**activation, "num_bits": 4, "strategy": "channel"}
    group = {"targets": ["0"], "weights": weight}
    group |= {"input_activations": activation, "output_activations": activation}
    assert describe(model) == {
        "quant_method": "quanttune",
        "version": "3",
        "format": "dense",
        "quantization_status": "frozen",
        "scheme": {
            "bits": 8, "weight_bits": 4, "coverage": "full_no_softmax", "weights": "channel",
            "residual": True, "overrides": {}, "methods": [],
        },
        "config_groups": {"group_0": group},
        "parameter_groups": {}, "operation_groups": {}, "call_groups": {}, "restorations": {},
    }  # fmt: skip


def test_zero_points_are_fields_of_compressed_tensors(tmp_path):
    x = torch.rand(7, 6)
    model = qt.quantize(nn.Sequential(nn.Linear(6, 5)), symmetric=False, data=[x])
    group = describe(model)["config_groups"]["group_0"]
    parts = {name: part["symmetric"] for name, part in group.items() if name != "targets"}
    assert parts == {"weights": True, "input_activations": False, "output_activations": False}
    qt.save(model, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    grid = {name.rpartition(".")[2]: t for name, t in tensors.items() if "input_quantizer" in name}
    assert grid == {"low": 0, "high": x.max(), "scale": x.max() / 255, "zero_point": -128}
    assert grid["zero_point"].dtype == torch.int32


# ------------------------------------------------------------------ what is refused


@pytest.fixture
def saved(tmp_path):
    example, other = pair("vit", overrides={"*.0.*": {"bits": 5}})
    qt.save(example.model, tmp_path / "model.safetensors")
    return example, other, tmp_path / "model.safetensors"


def refuse(model, path, message):
    """Check that a file is refused and the model left as it was."""
    inputs = torch.randn(2, 3, model.patch_embed.img_size[0], model.patch_embed.img_size[0])
    before, keys = model(inputs), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        qt.load(model, path)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(inputs), before)


def rewrite(path, change):
    """Write the file again with another description, or other tensors."""
    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()["quantization_config"])
    tensors = load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    text = change(data, tensors)
    metadata = {"quantization_config": json.dumps(data) if text is None else text}
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("kept", [0, 7, 100, 5000, -1])
def test_a_truncated_file(kept, saved):
    _, other, path = saved
    path.write_bytes(path.read_bytes()[:kept])
    refuse(other, path, "is no whole safetensors file")


def test_files_of_something_else(saved):
    _, other, path = saved
    save_file({"weight": torch.ones(3)}, path)
    refuse(other, path, r"holds no quantized model: it was not written by quanttune\.save")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        qt.load(other, path.with_name("other.safetensors"))


def test_models_of_something_else(saved):
    example, _, path = saved
    with pytest.raises(ValueError, match="VisionTransformer is quantized already"):
        qt.load(example.model, path)
    with pytest.raises(ValueError, match="VisionTransformer is not quantized"):
        qt.save(MODELS["vit"]().model, path)
    with pytest.raises(ValueError, match="that of another model than this SwinTransformer"):
        qt.load(MODELS["swin"]().model, path)
    options = {"img_size": 16, "patch_size": 4, "num_heads": 2, "num_classes": CLASSES}
    deeper = VisionTransformer(**options, embed_dim=24, depth=2).eval()
    refuse(deeper, path, r"another model than this VisionTransformer: it does not say blocks\.1")
    shallower = VisionTransformer(**options, embed_dim=24, depth=0).eval()
    refuse(shallower, path, r"the model has no blocks\.0")
    wider = VisionTransformer(**options, embed_dim=32, depth=1).eval()
    refuse(wider, path, r"is float32 \[.*\] in the file, float32 \[.*\] in the model")
    refuse(VisionTransformer(**options, embed_dim=24, depth=1, pre_norm=True).eval(), path, "more")
    half = VisionTransformer(**options, embed_dim=24, depth=1).eval().double()
    with pytest.raises(ValueError, match=r"is float32 \[.*\] in the file, float64"):
        qt.load(half, path)


def put(*keys, value):
    def change(data, tensors):
        *path, last = keys
        for key in path:
            data = data[key]
        data[last] = value

    return change


def drop(*keys):
    def change(data, tensors):
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def tensor(name, value):
    def change(data, tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = torch.as_tensor(value)

    return change


def again(groups):
    """List the first target in a group of its own, with fewer bits."""

    def change(data, tensors):
        group = json.loads(json.dumps(data[groups]["group_0"]))
        for arguments in group.values():
            if isinstance(arguments, dict):
                arguments["num_bits"] = 2
        data[groups]["more"] = {**group, "targets": group["targets"][:1]}

    return change


def operation(name, value):
    """Change a field of the first operation that modules call."""

    def change(data, tensors):
        operations = data["call_groups"]["group_0"]["operations"]
        operations[next(iter(operations))][name] = value

    return change


GROUP = ("config_groups", "group_0")
WEIGHTS = (*GROUP, "weights")
ACTIVATIONS = (*GROUP, "input_activations")
OPERATIONS = ("operation_groups", "group_0")
SCALE = "blocks.0.norm1.input_quantizer.scale"
ABSMAX = "blocks.0.norm1.input_quantizer.absmax"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("codebook", value=1), "the quantization has unknown field(s) codebook"),
        (drop("scheme"), "the quantization lacks scheme"),
        (put("version", value="1"), "version must be '3', got '1': quantize the float model again"),
        (put("quant_method", value="gptq"), "quant_method must be 'quanttune', got 'gptq'"),
        (put("scheme", "groups", value=128), "scheme has unknown field(s) groups"),
        (put("scheme", "bits", value=40), "bits must be from 2 to 16, got 40"),
        (put("scheme", "bits", value="8"), "scheme.bits must be a whole number, got '8'"),
        (put("scheme", "bits", value=8.5), "scheme.bits must be a whole number, got 8.5"),
        (put("scheme", "weight_bits", value=2.5), "scheme.weight_bits must be a whole number"),
        (put("scheme", "residual", value="no"), "scheme.residual must be true or false, got 'no'"),
        (put("scheme", "overrides", value=3), "scheme.overrides must be an object, got int"),
        (
            put("scheme", "overrides", value={"head": {"bits": 8.5}}),
            "scheme.overrides.head.bits must be a whole number, got 8.5",
        ),
        (put("scheme", "coverage", value=["full"]), "scheme holds a value of another type"),
        (
            again("config_groups"),
            "config_groups have the target 'blocks.0.attn.proj' more than once",
        ),
        (again("operation_groups"), "operation_groups have the target '"),
        (put("parameter_groups", value={"a": {"targets": ["x"], "weights": None}}), "'x' has no"),
        (lambda data, tensors: "[" * 100_000, "the quantization is no JSON"),
        (
            put("scheme", "methods", value="erq"),
            "scheme.methods must be a list of names, got 'erq'",
        ),
        (put("scheme", "coverage", value="all"), "coverage must be one of"),
        (put(*GROUP, "zero_point", value=3), "config_groups.group_0 has unknown field(s) zero"),
        (put(*GROUP, "targets", value="head"), "targets must be a list of names, got 'head'"),
        (put(*GROUP, "targets", value=["heads"]), "the model has no heads.weight_quantizer"),
        (put(*WEIGHTS, "group_size", value=128), "weights has unknown field(s) group_size"),
        (put(*WEIGHTS, "num_bits", value=32), "bits must be from 2 to 16, got 32"),
        (put(*WEIGHTS, "num_bits", value=8.0), "num_bits must be a whole number, got 8.0"),
        (put(*WEIGHTS, "symmetric", value=False), "symmetric must be one of [True], got False"),
        (put(*WEIGHTS, "type", value="float"), "type must be one of ['int'], got 'float'"),
        (put(*ACTIVATIONS, "observer", value=[]), "observer must be a name or null, got []"),
        (
            put(*WEIGHTS, "observer", value="ema"),
            "observer must be one of ['minmax', 'lsq', 'dorefa', None]",
        ),
        (put(*OPERATIONS, "kind", value=["x"]), "score, weight, got ['x']"),
        (put(*OPERATIONS, "kind", value=None), "is of the kind None, and of '"),
        (put(*OPERATIONS, "targets", value=["forward"]), "'forward' is no name of a functional"),
        (put("config_groups", value=[]), "config_groups must be an object, got list"),
        (lambda data, tensors: "[", "the quantization is no JSON"),
        (lambda data, tensors: "[]", "the quantization must be an object, got list"),
        (tensor("head.bias", None), "it lacks ['head.bias'], and has [] besides"),
        (tensor("head.code", [1.0]), "it lacks [], and has ['head.code'] besides"),
        (tensor("head.bias", [1.0, 2.0]), "head.bias is float32 [2] in the file, float32 [5]"),
        (put(*WEIGHTS, "dynamic", value=0), "dynamic must be one of [False], got 0"),
        (put(*ACTIVATIONS, "strategy", value="channel"), "strategy must be one of ['tensor'], got"),
        (put(*OPERATIONS, "kind", value="inputs"), "kind must be of convolution, embedding, input"),
        (
            operation("kinds", {"score": "scores"}),
            ".kinds must be of convolution, embedding, input",
        ),
        (operation("weight", 2), ".weight must be 0 or 1, or null"),
        (operation("parameter", "heads"), "the model has no parameter 'heads'"),
        (operation("owner", ""), "there is no quantized Linear ''"),
        (tensor(ABSMAX, float("inf")), f"{ABSMAX} is no end of a range: inf"),
        (tensor(ABSMAX, -1.0), f"{ABSMAX} is no end of a range: -1.0"),
        (tensor(SCALE, 0.0), f"{SCALE} must be finite and positive"),
        (tensor(SCALE, float("nan")), f"{SCALE} must be finite and positive"),
    ],
)
def test_what_is_not_ours_is_refused(change, message, saved):
    _, other, path = saved
    rewrite(path, change)
    refuse(other, path, re.escape(message))


ZERO = "blocks.0.norm1.input_quantizer.zero_point"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensor(ZERO, torch.tensor(16, dtype=torch.int32)), f"{ZERO} must be from -16 to 15, got"),
        (tensor(ZERO, None), f"it lacks ['{ZERO}'], and has [] besides"),
        (tensor(ZERO, 3.5), f"{ZERO} is float32 [] in the file, int32 [] in the model"),
        (put(*WEIGHTS, "symmetric", value=False), "symmetric must be one of [True], got False"),
        (put(*ACTIVATIONS, "symmetric", value=1.5), "symmetric must be one of [True, False], got"),
        (put(*ACTIVATIONS, "symmetric", value=True), "is symmetric, and other activations are not"),
        (put(*ACTIVATIONS, "dynamic", value=True), "calibrator 'dynamic' has no affine form"),
    ],
)
def test_other_zero_points_are_refused(change, message, tmp_path):
    example, other = pair("vit", symmetric=False, overrides={"*.0.*": {"bits": 5}})
    path = tmp_path / "model.safetensors"
    qt.save(example.model, path)
    rewrite(path, change)
    refuse(other, path, re.escape(message))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_learned_scales_that_are_none_are_refused(value, tmp_path):
    example, other = pair("vit")
    qt.learn_scales(example.model)
    path = tmp_path / "model.safetensors"
    qt.save(example.model, path)
    tensors = load_file(path)
    site = next(name for name in tensors if name.endswith("input_quantizer.factor"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors | {site: torch.full((), value)}, path, metadata)
    refuse(other, path, re.escape(f"{site.removesuffix('.factor')}.scale must be finite"))


def test_from_pretrained_refuses_unknown_fields(tmp_path):
    example, _ = pair("bert")
    example.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["codebook"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unknown field\(s\) codebook"):
        type(example.model).from_pretrained(tmp_path)


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    example, _, path = saved
    before = path.read_bytes()

    def fails(model, path, **_):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr("quanttune.quantization.saving.safetensors_file.save_model", fails)
    with pytest.raises(OSError, match="no space left"):
        qt.save(example.model, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_copy_keeps_what_it_is():
    example, _ = pair("vit")
    copied = copy.deepcopy(example.model)
    assert_same(example, copied)
