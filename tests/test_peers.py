"""Tuning beside other libraries: Fabric, ZeRO-3, regional compilation, experts, nested tensors."""

import warnings

import pytest
import torch
from lightning.fabric import Fabric
from models import BATCH, MODELS
from oracle import assert_near, constant, gradients, observing, quiet
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM


def test_fabric_in_mixed_precision():
    """Its backward may be the only one; eq. 3 under autocast by plain autograd."""
    example = MODELS["vit"]()
    with torch.autocast("cpu", torch.bfloat16):
        tuner = constant(example.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = gradients(example.model, tuner.combine(example.task_loss()))
    tuner.detach()
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    optimizer = torch.optim.SGD(example.model.parameters(), lr=0.0)
    model, optimizer = fabric.setup(example.model, optimizer)
    tuner = constant(example.model)
    for _ in range(2):
        optimizer.zero_grad()
        fabric.backward(tuner.combine(example.task_loss(model)))
        actual = {n: p.grad for n, p in example.model.named_parameters() if p.grad is not None}
        assert_near(actual, expected, 1e-2)  # logits are cast after autocast here


class HandOn(torch.autograd.Function):
    """What DeepSpeed's ZeRO-3 passes outputs through, to fetch weights before their backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class Doubled(HandOn):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.detach() * 2


def on_the_way_out(how: str):
    return {
        "function": lambda *call: HandOn.apply(call[-1]),
        "functions": lambda *call: HandOn.apply(HandOn.apply(call[-1]).float()),
        "clone": lambda *call: call[-1].clone(),
        "cast and view": lambda *call: HandOn.apply(call[-1]).double().unsqueeze(0),
        "doubled": lambda *call: Doubled.apply(call[-1]),
    }[how]


@quiet
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("how", ["function", "functions", "clone", "cast and view", "doubled"])
def test_logits_are_left_out_behind_what_a_wrapper_does(how, first):
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))
    x, hook = torch.randn(BATCH, 6), on_the_way_out(how)
    if first:  # deepspeed.initialize before attach
        for module in (model,) if how == "doubled" else (model[2], model):
            module.register_forward_hook(hook)
    with observing(model) as observers:
        if not first:
            model.register_forward_hook(hook)
            model._forward_hooks.move_to_end(next(iter(model._forward_hooks)))  # ours is last
        model(x)
        sites = {observation.site for observation in observers.take()}
    assert ("2.output" in sites) == (how == "doubled")
    assert "0.output" in sites


@quiet
@pytest.mark.parametrize("how", ["compile", "torch.compile"])
def test_a_part_that_is_compiled_by_itself_is_refused(how):
    def compile_part(model: nn.Module) -> None:
        if how == "compile":
            model.blocks[0].compile(backend="eager")
        else:
            model.blocks[0] = torch.compile(model.blocks[0], backend="eager")

    message = r"blocks.0 of VisionTransformer is compiled by itself"
    before = MODELS["vit"]()
    compile_part(before.model)
    with pytest.raises(ValueError, match=message):
        constant(before.model)
    example = MODELS["vit"]()
    tuner = constant(example.model)
    tuner.combine(example.task_loss()).backward()
    compile_part(example.model)
    with pytest.raises(ValueError, match=message):
        example.task_loss()


def test_experts_are_named():
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=30,
        num_local_experts=3,
        use_cache=False,
    )
    model = MixtralForCausalLM(config).train()
    words = torch.randint(30, (BATCH, 5))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the outlier term")
        tuner = constant(model)
        with pytest.warns(UserWarning, match=r"1 module\(s\) multiply.*layers.0.mlp.experts"):
            tuner.combine(model(words).logits.square().mean()).backward()
        tuner.detach()
        tuner = constant(model, exclude=["*.experts"])
        tuner.combine(model(words).logits.square().mean()).backward()


def test_nested_tensors_are_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    rows = [torch.randn(2, 6), torch.randn(4, 6)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    tuner = constant(model)
    with pytest.raises(TypeError, match=r"0.input is a nested tensor.*give padded batches"):
        model(nested)
    tuner.detach()
