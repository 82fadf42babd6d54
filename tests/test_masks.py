"""Padded tokens stay out of the loss of whole models, however the mask is given."""

import pytest
import torch
import torch.nn.functional as F
from models import BATCH, MODELS, TOKENS, Example
from oracle import Oracle, assert_near, constant, gradients, quiet
from torch import Tensor, nn

from quanttune.losses import Kurtosis
from quanttune.masks import counts_of
from quanttune.tuning.layout import has_holes

ALPHA = 0.4
MASKS = {
    "right": [[1] * n + [0] * (TOKENS - n) for n in (7, 3, 1, 5)],
    "left": [[0] * (TOKENS - n) + [1] * n for n in (7, 3, 1, 5)],
    "holes": [[1, 1, 0, 0, 1, 0, 1], [1] * 7, [0, 0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0]],
}
each_mask = pytest.mark.parametrize("side", MASKS)


class MaskedOracle(Oracle):
    """Eq. 2 over the tokens that count, which are taken out sample by sample."""

    counts: Tensor

    def see(self, x: Tensor) -> None:
        tokens = self.counts.shape
        if x.shape[:2] != tokens and x.shape[0] != tokens.numel():
            super().see(x)
            return
        parts = []
        for row, counts in zip(x.reshape(*tokens, -1), self.counts, strict=True):
            super().see(row[counts].reshape(1, -1))
            parts.append(self.ratios.pop())
        self.ratios.append(torch.stack(parts).mean())


def mask_of(side: str) -> Tensor:
    return torch.tensor(MASKS[side])


def task_loss(example: Example, mask: Tensor, model: nn.Module | None = None) -> Tensor:
    called = example.model if model is None else model
    logits = called(example.inputs, attention_mask=mask).logits
    if logits.dim() == 2:
        return F.cross_entropy(logits, example.labels)
    return F.cross_entropy(logits[mask.bool()], example.labels[mask.bool()])


def expected_gradients(example: Example, mask: Tensor, **options) -> tuple[Tensor, dict]:
    with MaskedOracle(example.model, example.heads, **options) as oracle:
        oracle.counts = mask.bool()
        loss = oracle.combine(task_loss(example, mask), ALPHA)
    return loss.detach(), gradients(example.model, loss)


def prepared(name: str) -> Example:
    example = MODELS[name]()
    for module_name, module in example.model.named_modules():
        if module_name.endswith(("k_proj", "key")):  # a softmax sees no bias of the keys
            module.bias.requires_grad_(False)
    return example


@quiet
@each_mask
@pytest.mark.parametrize("name", ["bert", "opt"])
def test_loss_and_gradients_are_those_of_the_tokens_that_count(name, side):
    example, mask = prepared(name), mask_of(side)
    loss, expected = expected_gradients(example, mask)
    tuner = constant(example.model, ALPHA)
    for _ in range(2):
        total = tuner.combine(task_loss(example, mask))
        torch.testing.assert_close(total.double(), loss.double(), rtol=1e-6, atol=0)
        assert_near(gradients(example.model, total), expected)
        tuner.combine(task_loss(example, torch.ones_like(mask))).backward()


@quiet
@pytest.mark.parametrize("side", ["left", "holes"])
def test_a_loss_in_pytorch_leaves_padding_out_too(side):
    example, mask = prepared("bert"), mask_of(side)
    centred = lambda rows: rows - rows.mean(1, keepdim=True)  # noqa: E731
    kurtosis = lambda rows: centred(rows).pow(4).mean(1) / rows.var(1, correction=0) ** 2  # noqa: E731
    cost = {"cost_of_rows": lambda rows: (kurtosis(rows) - 1.8) ** 2}
    loss, expected = expected_gradients(example, mask, **cost)
    total = constant(example.model, ALPHA, loss=Kurtosis()).combine(task_loss(example, mask))
    torch.testing.assert_close(total.double(), loss.double(), rtol=1e-6, atol=0)
    assert_near(gradients(example.model, total), expected)


@quiet
@pytest.mark.parametrize("side", ["right", "holes"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(side, reentrant):
    example, mask = prepared("opt"), mask_of(side)
    _, expected = expected_gradients(example, mask)
    tuner = constant(example.model, ALPHA)
    example.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_near(gradients(example.model, tuner.combine(task_loss(example, mask))), expected)


@quiet
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("side", ["left", "holes"])
def test_one_compiled_graph_serves_every_mask(side):
    torch.compiler.reset()
    example, mask = prepared("bert"), mask_of(side)
    _, expected = expected_gradients(example, mask)
    whole = torch.ones_like(mask)
    _, expected_whole = expected_gradients(example, whole)
    tuner = constant(example.model, ALPHA)
    tuner.combine(task_loss(example, mask))  # the plan, and whether there are holes
    model = torch.compile(example.model, backend="aot_eager", fullgraph=True)
    for given, gradient in ((mask, expected), (whole, expected_whole)):
        total = tuner.combine(task_loss(example, given, model))
        assert_near(gradients(example.model, total), gradient)


@quiet
def test_other_ways_to_give_the_mask():
    example, mask = prepared("bert"), mask_of("right")
    loss, _ = expected_gradients(example, mask)
    by_position = constant(example.model, ALPHA)
    logits = example.model(example.inputs, mask).logits
    total = by_position.combine(F.cross_entropy(logits, example.labels))
    torch.testing.assert_close(total.double(), loss.double(), rtol=1e-6, atol=0)
    by_position.detach()
    by_function = constant(example.model, ALPHA, mask=lambda given: given["attention_mask"] > 0)
    torch.testing.assert_close(
        by_function.combine(task_loss(example, mask)).double(), loss.double(), rtol=1e-6, atol=0
    )
    by_function.detach()
    padding_counts = constant(example.model, ALPHA, mask=None)
    assert abs(padding_counts.combine(task_loss(example, mask)) - loss) > 1e-3


@quiet
def test_a_mask_of_the_other_sense_and_what_has_no_tokens():
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.norm = nn.LayerNorm(6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor, is_padding: Tensor) -> Tensor:
            x = self.norm(self.inner(x))
            kept = torch.where(is_padding[:, :, None], 0, x)
            return self.head(kept.sum(1))  # (BATCH, 6): no tokens

    model, mask = Encoder(), mask_of("holes")
    x = torch.randn(BATCH, TOKENS, 6)
    example = Example(model, x, torch.zeros(BATCH, dtype=torch.int64), ("head",))
    with MaskedOracle(model, example.heads) as oracle:
        oracle.counts = mask.bool()
        expected = oracle.combine(model(x, mask == 0).square().mean(), ALPHA)
    tuner = constant(model, ALPHA, mask=lambda given: ~given["is_padding"])
    total = tuner.combine(model(x, is_padding=mask == 0).square().mean())
    torch.testing.assert_close(total.double(), expected.double(), rtol=1e-6, atol=0)


@quiet
def test_a_sample_of_nothing_but_padding_has_ratio_zero():
    example, mask = prepared("bert"), mask_of("right")
    mask[2] = 0
    tuner = constant(example.model, ALPHA)
    tuner.combine(task_loss(example, mask)).backward()
    ranges = tuner.ranges()
    assert all(value == value for value in ranges.values())
    assert all(p.grad.isfinite().all() for p in example.model.parameters() if p.grad is not None)


@quiet
def test_forwards_that_differ_in_their_padding_before_one_backward():
    example = prepared("bert")
    masks = [mask_of("right"), mask_of("left")]
    expected = [expected_gradients(example, mask)[0] for mask in masks]
    tuner = constant(example.model, ALPHA)
    total = tuner.combine(sum(task_loss(example, mask) for mask in masks) / 2)
    mean = torch.stack(expected).mean()
    torch.testing.assert_close(total.double(), mean.double(), rtol=1e-6, atol=0)
    tuner.detach()
    tuner = constant(example.model, ALPHA)
    example.model.activation_checkpointing_enable({"use_reentrant": False})
    total = sum(task_loss(example, mask) for mask in masks)
    with pytest.raises(RuntimeError, match="one of several forwards that differ in their padding"):
        tuner.combine(total).backward()


def test_which_tokens_count_by_masks_of_all_senses():
    counts = torch.tensor([[True, True, False], [False, True, True]])
    added = torch.where(counts, 0.0, -1e4)
    for mask in (
        counts,
        counts.long(),
        counts.float(),
        added,
        added.masked_fill(~counts, -torch.inf),
    ):
        assert torch.equal(counts_of(mask), counts)


@pytest.mark.parametrize(
    ("row", "expected"),
    [("1100", False), ("0011", False), ("0110", False), ("1011", True), ("0101", True)],
)
def test_padding_between_tokens_is_a_hole(row, expected):
    counts = torch.tensor([[token == "1" for token in row], [True] * 4])
    assert has_holes(counts) == expected
