"""Which tensors are observed, and when: kinds of sites, what nobody calls, every k-th step."""

import warnings

import pytest
import timm
import torch
from models import MODELS
from oracle import Oracle, assert_near, constant, expected_step, gradients, quiet
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import quanttune as qt
from quanttune.tuning.sites import find_sites


def test_rms_norms_are_sites_by_option():
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=30,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    norms = [name for name, module in model.named_modules() if "RMSNorm" in type(module).__name__]
    assert len(norms) == 5
    assert not set(norms) & set(find_sites(model))
    kinds = ("linear", "layer_norm", "rms_norm")
    assert set(find_sites(model, kinds=kinds)) == {*find_sites(model), *norms}
    tuner = constant(model, sites=kinds, include=["*norm*"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the outlier term")
        tuner.combine(model(torch.randint(30, (4, 7))).logits.square().mean()).backward()
    assert {site.rpartition(".")[0] for site in tuner.ranges()} == set(norms)
    assert find_sites(nn.Sequential(nn.RMSNorm(3)), kinds=["rms_norm"])


@quiet
def test_the_gradient_with_rms_norms():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.head = nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.inner(x)))

    model, x = Model(), torch.randn(4, 5, 6)
    with Oracle(model, ["head"]) as oracle:
        hooks = [
            model.norm.register_forward_pre_hook(lambda _, args: oracle.see(args[0])),
            model.norm.register_forward_hook(lambda *call: oracle.see(call[2])),
        ]
        expected = gradients(model, oracle.combine(model(x).square().mean(), 0.3))
        for hook in hooks:
            hook.remove()
    tuner = constant(model, sites=("linear", "rms_norm"))
    assert_near(gradients(model, tuner.combine(model(x).square().mean())), expected)


@quiet
def test_modules_that_nobody_calls_are_named():
    """EVA02 multiplies by the weight of its qkv in a function."""
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2, num_classes=3).train()
    images = torch.randn(2, 3, 28, 28)
    tuner = constant(model)
    with pytest.warns(UserWarning, match=r"did not call \d observed module\(s\).*attn.qkv"):
        tuner.combine(model(images).square().mean()).backward()
    tuner.combine(model(images).square().mean()).backward()  # once is enough
    tuner.detach()
    constant(model, exclude=["*attn.qkv"]).combine(model(images).square().mean()).backward()


@quiet
def test_every_third_step_counts_three_times():
    example = MODELS["vit"]()
    _, task = expected_step(example, 0.0)
    _, outlier = expected_step(example, 1.0)
    tuner = qt.attach(example.model, 0.4, "constant", observe_every=3)
    for step in range(5):
        for _ in range(2):  # micro-batches of one step
            total = tuner.combine(example.task_loss())
            weight = 0.4 * 3 * (step % 3 == 0)
            expected = {
                name: 0.6 * task.get(name, 0) + weight * outlier[name]
                for name in (outlier if weight else task)
            }
            assert_near(gradients(example.model, total), expected)
        tuner.step()
    tuner.resume(6)
    assert tuner.combine(example.task_loss()) != 0.6 * example.task_loss()


def test_what_is_refused():
    model = MODELS["vit"]().model
    with pytest.raises(ValueError, match="sites must be some of linear, layer_norm, rms_norm"):
        qt.attach(model, total_steps=1, sites=["conv"])
    with pytest.raises(ValueError, match="observe_every must be at least 1, got 0"):
        qt.attach(model, total_steps=1, observe_every=0)
