"""Masks of encoders, decoders and towers of one length: each is for its own sequence only."""

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import Oracle, assert_near, constant, gradients, quiet
from stacks import STACKS, Padded
from torch import Tensor, nn

from quanttune import quantize
from quanttune.analysis.probes import sites_of
from quanttune.origins import Origins

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"  # Dynamo reads it
)
# what a model answers, which CLIP does before it normalizes
HEADS = ("lm_head", "decoder.cls.predictions.decoder", "text_projection", "visual_projection")


def ranges(model: nn.Module, data: list, **options) -> dict[str, float]:
    quantized = quantize(copy.deepcopy(model.eval()), data=data, coverage="full", **options)
    return {
        site: quantizer.absmax.item()
        for site, quantizer in sites_of(quantized).items()
        if site.count(".") or "score" not in site  # CLIP compares each text with every image
    }


def assert_ranges(actual: dict[str, float], expected: dict[str, float]) -> None:
    common = actual.keys() & expected.keys()  # T5 adds masks to tables, where there are any
    assert len(common) > 0.9 * len(expected)
    assert {s: actual[s] for s in common} == pytest.approx({s: expected[s] for s in common}, 1e-4)


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "sdpa") for name in STACKS), ("bart", "eager"), ("t5", "eager")],
)
def test_calibrated_ranges_are_those_of_the_samples_alone(name, attention):
    torch.manual_seed(1)
    model, batch, alone = STACKS[name]()
    model.set_attn_implementation(attention)
    expected = ranges(model, alone)
    assert_ranges(ranges(model, [batch]), expected)
    counted_in = ranges(model, [batch], mask=None)
    assert name == "clip" or any(
        counted_in[s] > 1.01 * expected[s] for s in counted_in.keys() & expected.keys()
    )


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return what a model answers of the tokens that count."""
    answer = model(**batch)
    if "logits" not in answer:
        return [answer.text_embeds, answer.image_embeds]
    words = "decoder_" if "decoder_input_ids" in batch else ""
    mask = batch.get(f"{words}attention_mask")
    return [answer.logits if mask is None else answer.logits[mask.bool()]]


def task_loss(model: nn.Module, batch: dict[str, Tensor], samples: int) -> Tensor:
    return sum((y - 1).square().sum() for y in outputs(model, batch)) / samples


def expected_step(made: Padded, alpha: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and gradients over the samples one by one, by plain autograd."""
    samples = len(made.alone)
    with Oracle(made.model, HEADS) as oracle:
        oracle.batch = 1
        losses = [
            oracle.combine(samples * task_loss(made.model, one, samples), alpha)
            for one in made.alone
        ]
        loss = torch.stack(losses).mean()
    return loss.detach(), gradients(made.model, loss)


def prepared(name: str) -> Padded:
    torch.manual_seed(2)
    made = STACKS[name]()
    made.model.train().set_attn_implementation("eager")
    for module_name, module in made.model.named_modules():
        if module_name.endswith(("k_proj", "key")) and module.bias is not None:
            module.bias.requires_grad_(False)  # a softmax sees no bias of the keys
    return made


def flipped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: x.flip(0) for key, x in batch.items()}


def assert_step(made: Padded, tuner, expected, call: Callable, batch: dict) -> None:
    total = tuner.combine(task_loss(call, batch, len(made.alone)))
    torch.testing.assert_close(total.double(), expected[0].double(), rtol=1e-5, atol=0)
    assert_near(gradients(made.model, total), expected[1], 1e-4)


@quiet
@pytest.mark.parametrize("name", STACKS)
def test_loss_ranges_and_gradients_are_those_of_the_samples_alone(name):
    made = prepared(name)
    expected = expected_step(made, 0.4)
    one_by_one = constant(made.model, 0.4)
    wanted: dict[str, float] = {}
    for one in made.alone:
        one_by_one.combine(task_loss(made.model, one, 1))
        for site, value in one_by_one.ranges().items():
            wanted[site] = max(value, wanted.get(site, 0))
    one_by_one.detach()
    tuner = constant(made.model, 0.4)
    for batch in (made.batch, flipped(made.batch), made.batch):  # the first is followed
        assert_step(made, tuner, expected, made.model, batch)
        assert tuner.ranges() == pytest.approx({s: wanted[s] for s in tuner.ranges()}, 1e-5)
    tuner.detach()


@quiet
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_the_first_forward_may_end_before_it_has_learned_all(error, monkeypatch):
    made = prepared("bart")
    expected = expected_step(made, 0.4)
    tuner = constant(made.model, 0.4)

    def end(*_: object) -> None:
        raise error

    handle = made.model.model.decoder.layers[0].fc1.register_forward_pre_hook(end)
    with pytest.raises(error):
        made.model(**made.batch)
    handle.remove()
    with monkeypatch.context() as patch:  # no hook tells of an interrupt
        patch.setattr(Origins, "tag", end)
        assert torch.equal(torch.ones(3) + torch.ones(3), torch.full((3,), 2.0))
    assert_step(made, tuner, expected, made.model, made.batch)
    tuner.detach()
    assert torch._C._len_torch_function_stack() == 0
