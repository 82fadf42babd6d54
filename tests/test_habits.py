"""What users do to a model's modules, and expect of quantized ones too."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from models import gpt2
from spawned import answer
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import quanttune as qt
from quanttune import fake_quant
from quanttune.fake_quantizer import scale_of
from quanttune.quantization.float_parameters import float_parameters
from quanttune.quantization.running import evaluating, in_float
from quanttune.quantization.state import is_quantized, weight_quantizers


def rows(weight, bits):
    """Round each output channel of a weight to its own grid."""
    absmax = weight.detach().abs().flatten(1).amax(1)
    return fake_quant(weight.detach(), scale_of(absmax, bits), bits, 0)


def weights_only(model, *args):
    """Call a quantized model whose activations pass."""
    with in_float(model):
        for _, quantizer in weight_quantizers(model).values():
            quantizer.enabled = True
        return model(*args)


def mlp(change=lambda module: module):
    return nn.Sequential(change(nn.Linear(6, 6)), nn.GELU(), nn.Linear(6, 3)).eval()


X = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------ weights that are computed


def _pruned(module):
    return prune.l1_unstructured(module, "weight", 0.5)


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": _pruned,
    "old spectral_norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_rounded_as_it_is(name):
    model = mlp(COMPUTED[name])
    model(X)
    expected = mlp()
    expected[0].weight.data = rows(model[0].weight, 4)
    expected[0].bias.data = model[0].bias.data
    expected[2].weight.data = rows(model[2].weight, 4)
    expected[2].bias.data = model[2].bias.data
    names = set(model.state_dict())
    qt.quantize(model, weight_bits=4, data=[X])
    torch.testing.assert_close(weights_only(model, X), expected(X))
    assert {n for n in model.state_dict() if "quantizer" not in n} == names
    assert [n for n in float_parameters(model) if n.startswith("0.")] == ["0.bias"]
    model(X).square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if n.startswith("0.")}
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_the_weight_of_a_hook_is_that_of_the_parameters_now():
    model = mlp(_pruned)
    qt.quantize(model, data=[X])
    with torch.no_grad():
        model[0].weight_orig.mul_(2)
    holder, quantizer = weight_quantizers(model)["0.weight_quantizer"]
    expected = model[0].weight_orig * model[0].weight_mask
    assert torch.equal(quantizer.scale_of(holder.weight), quantizer.scale_of(expected))


@pytest.mark.parametrize("method", ["gptq", "smoothquant"])
def test_methods_leave_computed_weights_alone(method):
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), mlp(_pruned)).eval()
    parametrizations.weight_norm(model[3][2])
    before = {n: p.detach().clone() for n, p in model[3].named_parameters()}
    qt.quantize(model, methods=[method], data=[X])
    assert all(torch.equal(p, before[n]) for n, p in model[3].named_parameters())


def test_a_parametrized_model_can_be_copied():
    model = mlp(parametrizations.weight_norm)
    qt.quantize(model, data=[X])
    again = copy.deepcopy(model)
    assert torch.equal(again(X), model(X))
    assert parametrize.is_parametrized(again[0])


def test_an_error_leaves_a_parametrized_model_as_it_was():
    model = mlp(parametrizations.weight_norm)
    own, expected = type(model[0]), model(X)
    with pytest.raises(ValueError, match="matches no quantizer"):
        qt.quantize(model, overrides={"nothing": None}, data=[X])
    assert type(model[0]) is own
    assert torch.equal(model(X), expected)


# ------------------------------------------------------------------ classes


class Named(nn.Linear):
    """A Linear of a user, with things of its own."""

    label = "mine"

    @property
    def outputs(self):
        return self.out_features


def test_a_class_of_a_user_keeps_what_it_has():
    model = nn.Sequential(Named(6, 3)).eval()
    qt.quantize(model, data=[X])
    assert isinstance(model[0], Named)
    assert (model[0].label, model[0].outputs) == ("mine", 3)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [saved, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_of_conv1d_can_be_copied(copied):
    example = gpt2()
    qt.quantize(example.model.eval(), data=[example.inputs])
    assert torch.equal(example.logits(copied(example.model)), example.logits())


def test_a_spawned_process_gets_a_quantized_model():
    example = gpt2()
    qt.quantize(example.model.eval(), data=[example.inputs])
    expected = example.model(torch.arange(2, 7)[None]).logits
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer, args=(example.model, queue))
    process.start()
    found = torch.from_numpy(queue.get(timeout=300))
    process.join()
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 9)),
        (nn.Conv1d(4, 4, 2, groups=2, stride=2), (2, 4, 8)),
        (nn.Conv3d(2, 4, 2, stride=2), (2, 2, 4, 4, 4)),
    ],
)
def test_other_convolutions_are_quantized_like_by_hand(layer, shape):
    model, x = nn.Sequential(layer).eval(), torch.randn(shape)

    def grid(tensor):
        return scale_of(tensor.abs().max(), 6)

    expected = copy.deepcopy(layer)
    expected.weight.data = rows(layer.weight, 6)
    y = expected(fake_quant(x, grid(x), 6))
    y = fake_quant(y, grid(model(x)), 6).detach()
    qt.quantize(model, 6, data=[x])
    torch.testing.assert_close(model(x).detach(), y, rtol=1e-6, atol=1e-6)
    assert qt.summary(model).sites[1].kind == "convolution"


def test_what_stays_float_has_a_reason():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            return x @ self.table

    model = nn.Sequential(Scaled(6, 6), Table(), nn.LayerNorm(6), nn.Linear(6, 6), mlp()).eval()
    qt.quantize(model, overrides={"4.0": None}, data=[X])
    reasons = float_parameters(model)
    # what is multiplied with is rounded, in whatever class
    assert not {"0.weight", "1.table"} & reasons.keys()
    assert reasons["2.weight"] == "biases, and what a LayerNorm scales by, stay float"
    assert reasons["4.0.weight"] == "an override leaves it in float"
    assert not {"3.weight", "4.2.weight"} & reasons.keys()


# ------------------------------------------------------------------ types, devices, modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_stay_float32_in_other_types(dtype, symmetric):
    """Equal to the scales of the float32 model, which were rounded to nothing."""
    model = qt.quantize(mlp(), symmetric=symmetric, data=[X])
    scales = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    expected = model(X)
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    assert {n: b.dtype for n, b in model.named_buffers() if n in scales} == dict.fromkeys(
        scales, torch.float32
    )
    assert all(torch.equal(b, scales[n]) for n, b in model.named_buffers() if n in scales)
    output = model(X.to(dtype))
    assert output.dtype == dtype
    assert (output.float() - expected).abs().max() < 0.1
    assert torch.equal(model.float()(X).isfinite(), torch.ones(7, 3, dtype=torch.bool))


def test_learned_scales_stay_float32():
    model = qt.quantize(mlp(), data=[X])
    qt.learn_scales(model)
    model.to(torch.bfloat16)
    assert model[0].input_quantizer.factor.dtype == torch.float32
    model(X.bfloat16()).sum().backward()


def test_a_model_can_move_to_meta_and_be_made_anew():
    model = qt.quantize(mlp(), data=[X])
    state, expected = copy.deepcopy(model.state_dict()), model(X)
    model.to("meta")
    assert model[0].input_quantizer.scale.device.type == "meta"
    model.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(model(X), expected)


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).mean((2, 3))))


@pytest.mark.parametrize(("frozen", "training"), [("norm", True), ("drop", True), ("conv", False)])
def test_each_module_keeps_its_mode(frozen, training, tmp_path):
    model, x = Frozen().train(training), torch.randn(4, 3, 8, 8)
    getattr(model, frozen).train(not training)
    modes = {m: m.training for m in model.modules()}
    statistics = model.norm.running_mean.clone()
    qt.quantize(model, data=[x])
    qt.export_onnx(model, x, tmp_path / "model.onnx")
    assert {m: m.training for m in modes} == modes
    assert torch.equal(model.norm.running_mean, statistics)


def test_modes_come_back_after_an_error_and_through_train():
    class Merging(nn.Linear):
        """Merges in evaluation, as adapters do, and must be told by train()."""

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(6, 6), nn.Sequential(Merging(6, 6)))
    model[1].eval()

    def fails():
        with evaluating(model):
            assert model[0].merged
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert (model[0].training, model[0].merged) == (True, False)
    assert (model[1].training, model[1][0].training, model[1][0].merged) == (False, False, True)


# ------------------------------------------------------------------ embeddings

INDICES = torch.tensor([[1, 2, 2, 0], [4, 2, 1, 1]])


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words, self.head = nn.Embedding(6, 4, **options), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.words(x))


@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize(
    "options", [{"sparse": True}, {"scale_grad_by_freq": True}, {"padding_idx": 2}, {}]
)
def test_embeddings_keep_their_options(options, weights):
    model = Words(**options).eval()
    expected = copy.deepcopy(model)
    qt.quantize(model, weights=weights, data=[INDICES])
    gradients = []
    for one in (expected, model):
        with in_float(model):
            one(INDICES).square().sum().backward()
        gradients.append(one.words.weight.grad)
    assert gradients[0].layout == gradients[1].layout
    torch.testing.assert_close(gradients[1].to_dense(), gradients[0].to_dense())
    model.zero_grad()
    model(INDICES).square().sum().backward()  # rounded
    assert model.words.weight.grad.layout == gradients[0].layout
    torch.testing.assert_close(
        model.words.weight.grad.to_dense(), gradients[0].to_dense(), rtol=0.2, atol=0.05
    )


def test_an_embedding_of_one_scale_is_rounded_as_a_whole():
    model = Words().eval()
    table = model.words.weight.detach()
    expected = fake_quant(table, scale_of(table.abs().max(), 3), 3)[INDICES]
    qt.quantize(model, weight_bits=3, weights="tensor", data=[INDICES])
    assert torch.equal(model.words(INDICES), expected)


# ------------------------------------------------------------------ instances


def test_a_forward_of_an_instance_is_refused_by_name():
    def patched(module):
        inner = module.forward
        module.forward = lambda *args: inner(*args)
        return module

    for model in (mlp(patched), nn.Sequential(patched(mlp())), patched(mlp())):
        expected, own = model(X), [vars(m).get("forward") for m in model.modules()]
        name = next(n for n, m in model.named_modules() if "forward" in vars(m))
        with pytest.raises(ValueError, match=f"^{name or 'Sequential'} has a forward of its own"):
            qt.quantize(model, data=[X])
        assert not is_quantized(model)
        assert [vars(m).get("forward") for m in model.modules()] == own
        assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match="OptimizedModule has a forward of its own"):
        qt.quantize(torch.compile(mlp()), data=[X])


def test_a_forward_of_the_class_on_the_instance_does_not_hide_the_quantized_one():
    model = mlp()
    expected = qt.quantize(copy.deepcopy(model), 4, data=[X])(X)
    model[0].forward = model[0].forward
    assert torch.equal(qt.quantize(model, 4, data=[X])(X), expected)


def test_hooks_of_accelerate_run_what_is_quantized(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = mlp()
    expected = qt.quantize(copy.deepcopy(model), 4, data=[X])(X)
    dispatched = accelerate.dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    with pytest.raises(ValueError, match="matches no quantizer"):
        qt.quantize(dispatched, overrides={"nothing": None}, data=[X])
    assert torch.equal(dispatched(X), model(X))
    qt.quantize(dispatched, 4, data=[X])
    assert torch.equal(dispatched(X), expected)
    assert hasattr(dispatched[0], "_hf_hook")
    assert torch.equal(copy.deepcopy(dispatched)(X), expected)
    qt.export_onnx(dispatched, X, tmp_path / "model.onnx")
    accelerate.hooks.remove_hook_from_module(dispatched, recurse=True)
    assert torch.equal(dispatched(X), expected)


def test_models_that_are_not_on_one_device_are_refused_by_name():
    accelerate = pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match=r"^0\.weight is on the device meta"):
        qt.quantize(accelerate.cpu_offload(mlp()), data=[X])
    model = mlp()
    model[2].to("meta")
    with pytest.raises(ValueError, match=r"^2\.weight is on the device meta"):
        qt.quantize(model, data=[X])
    with pytest.raises(ValueError, match=r"^0\.weight is on the device meta"):
        qt.quantize(mlp().to("meta"), calibrator="dynamic")


# ------------------------------------------------------------------ adapters


def test_a_model_around_a_quantized_one_is_told_from_it(tmp_path):
    model = nn.Sequential(qt.quantize(mlp(), data=[X]))
    with pytest.raises(ValueError, match="Sequential was made around a quantized model: pass that"):
        qt.summary(model)
    with pytest.raises(ValueError, match="made around a quantized model"):
        qt.save(model, tmp_path / "model.safetensors")


def test_a_part_of_a_quantized_model_is_quantized(tmp_path):
    model = nn.Sequential(mlp(), nn.Linear(3, 3)).eval()
    qt.quantize(model, data=[X])
    qt.save(model[0], tmp_path / "model.safetensors")
    assert next(site.name for site in qt.summary(model[0]).sites) == "0.weight_quantizer"
    loaded = qt.load(mlp(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(X), model[0](X))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("first", ["quantize", "adapters"])
def test_adapters_are_merged(first, tmp_path):
    peft = pytest.importorskip("peft")
    example = gpt2()
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = example.model.eval()
    if first == "quantize":
        qt.quantize(model, data=[example.inputs])
        model = peft.get_peft_model(model, config).eval()
        with pytest.raises(ValueError, match=r"made around a quantized model.*merge_and_unload"):
            qt.summary(model)
    else:
        model = qt.quantize(peft.get_peft_model(model, config).eval(), data=[example.inputs])
    merged = model.merge_and_unload()
    qt.save(merged, tmp_path / "model.safetensors")
    loaded = qt.load(gpt2().model.eval(), tmp_path / "model.safetensors")
    assert torch.equal(example.logits(loaded), example.logits(merged))
    assert "lora" not in str(qt.summary(merged))
