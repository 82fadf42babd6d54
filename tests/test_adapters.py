"""Adapters of PEFT: what is observed is what merging leaves, and what is trained is merged."""

import copy
import warnings

import pytest
import torch
from cases import contents, run, save_tokenizer, tune, write_csv
from models import BATCH, MODELS, TOKENS, WORDS, gpt2
from oracle import Oracle, assert_near, constant, gradients, quiet
from safetensors.torch import load_file
from test_trainer import TUNING, parameters, rows, trainer
from torch import nn
from transformers import AutoModelForSequenceClassification, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta

import quanttune as qt

peft = pytest.importorskip("peft")
from quanttune.jobs import adapters  # noqa: E402

pytestmark = [
    quiet,
    # of transformers, when PEFT asks a model whether it has checkpoints
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
EXAMPLES = {"bert": MODELS["bert"], "opt": MODELS["opt"], "gpt2": gpt2}
each = pytest.mark.parametrize("name", EXAMPLES)


def adapted(name, drawn=(), noise=0.0):
    """Return an example in float64, and a copy of its model with adapters of rank 2."""
    example = EXAMPLES[name](2)
    example.model.double()
    for module in example.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = adapters.add_adapters(copy.deepcopy(example.model), 2, drawn).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.add_(noise * torch.randn_like(parameter))
    return example, model


def of(model):
    """Return a model as something that an example calls by position."""
    return lambda words: model(input_ids=words)


def seen(tuner):
    return {o.site: (o.multiplicity, o.statistics) for o in tuner._observed}


@each
def test_adapters_at_zero_leave_what_is_observed(name):
    example, model = adapted(name)
    plain, tuner = constant(example.model), constant(model)
    losses = [plain.combine(example.task_loss()), tuner.combine(example.task_loss(of(model)))]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    expected, found = seen(plain), seen(tuner)
    assert list(found) == list(expected)
    for site, (multiplicity, statistics) in expected.items():
        assert found[site][0] == multiplicity, site
        torch.testing.assert_close(found[site][1], statistics, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("name", ["bert", "opt"])  # the oracle knows no Conv1D
def test_the_gradient_is_that_of_the_merged_weights(name, reentrant):
    """With W + B A merged, eq. 3 by autograd gives G = dL/dW; then dL/dB = G A^T, dL/dA = B^T G."""
    example, model = adapted(name, noise=0.1)
    factors = {
        key.removeprefix("base_model.model."): (m.lora_A.default.weight, m.lora_B.default.weight)
        for key, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    with Oracle(merged, example.heads) as oracle:
        whole = gradients(merged, oracle.combine(example.task_loss(merged), 0.3))
    if reentrant is not None:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
        model.get_base_model().enable_input_require_grads()
    tuner = constant(model)
    tuner.combine(example.task_loss(of(model))).backward()
    expected, found = {}, {}
    for key, (a, b) in factors.items():
        expected |= {f"{key} A": b.T @ whole[f"{key}.weight"]}
        expected |= {f"{key} B": whole[f"{key}.weight"] @ a.T}
        found |= {f"{key} A": a.grad, f"{key} B": b.grad}
    assert_near(found, expected, 1e-7)


def test_what_is_trained_whole_is_observed_once():
    """A head of several modules is copied by PEFT, and the original is never called."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = RobertaConfig(vocab_size=WORDS, hidden_size=24, **sizes, **dropout)
    plain = Roberta(config).train()
    parts = ["classifier.dense.weight", "classifier.out_proj.weight"]
    for drawn in (parts, [*parts, "classifier.temperature"]):
        model = adapters.add_adapters(copy.deepcopy(plain), 2, drawn)
        words = torch.randint(2, WORDS, (BATCH, TOKENS))
        tuners = constant(plain), constant(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "the outlier term's gradient norm")
            for tuner in tuners:
                tuner.combine(tuner.model(input_ids=words).logits.square().mean())
        assert list(seen(tuners[1])) == list(seen(tuners[0]))
        assert "classifier.out_proj.input" in seen(tuners[0])
        assert "classifier.out_proj.output" not in seen(tuners[1])  # logits
        tuners[0].detach()


def test_injected_adapters_are_observed_as_well():
    example = EXAMPLES["bert"]()
    expected = constant(example.model)
    expected.combine(example.task_loss())
    expected.detach()
    config = peft.LoraConfig(r=2, target_modules=["query", "dense"])
    model = peft.inject_adapter_in_model(config, example.model)
    tuner = constant(model)
    tuner.combine(example.task_loss(model))
    assert tuner.ranges() == expected.ranges()


def test_finishing_is_refused():
    _, model = adapted("bert")
    with pytest.raises(ValueError, match="merge_and_unload"):
        qt.attach(model, total_steps=4, finish_steps=2)


def test_a_model_whose_own_weights_are_drawn_is_refused():
    with pytest.raises(ValueError, match="Sequential's own, so that --lora-rank would train all"):
        adapters.add_adapters(nn.Sequential(nn.Linear(2, 2)), 2, ["cls_token"])


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_micro_batches_of_the_trainer_are_a_mean(micro_batches, tmp_path):
    example = EXAMPLES["bert"]()
    model = adapters.add_adapters(example.model, 2, [])
    before = parameters(model)
    data = rows(BATCH, "bert")
    sizes = {
        "per_device_train_batch_size": BATCH // micro_batches,
        "gradient_accumulation_steps": micro_batches,
    }
    trainer(tmp_path, model, data, tuning=TUNING, **sizes).train()
    moved = {key: before[key] - p for key, p in parameters(model).items() if "lora_B" in key}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(before[key])
    model.zero_grad()
    tuner = constant(model, 0.3)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    tuner.combine(model(**batch).loss).backward()
    expected = {k: 0.1 * p.grad for k, p in model.named_parameters() if "lora_B" in k}
    assert_near(moved, expected, 1e-4)  # a float32 parameter minus a small step


# ------------------------------------------------------------------ `quanttune tune`

LORA = ["--lora-rank", 2, "--learning-rate", 0.05, "--save-steps", 1]


@pytest.fixture
def new_head(tmp_path, cache):
    """Return the arguments of a run on a BERT without a head, and its folder."""
    example = MODELS["bert"](2)
    example.model.bert.save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    texts = [(" ".join(["w1"] * (1 + i % 3)) + f" w{i}", i % 3) for i in range(8)]
    write_csv(tmp_path / "data.csv", ("text", "label"), texts)
    return [
        tmp_path / "bert", "--data", tmp_path / "data.csv", "--task", "text-classification",
        "--out", tmp_path / "run", "--steps", 3, "--batch-size", 4, *LORA,
    ]  # fmt: skip


def test_a_run_ends_with_a_plain_model(new_head, tmp_path):
    assert tune(*new_head).exit_code == 0
    folder, checkpoint = tmp_path / "run" / "model", tmp_path / "run" / "checkpoint-3"
    model, found = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("lora" in key for key in load_file(folder / "model.safetensors"))
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=3)
    start = {key: value.clone() for key, value in base.state_dict().items()}
    unmerged = peft.PeftModel.from_pretrained(base, checkpoint).eval()
    words = torch.randint(4, WORDS, (BATCH, TOKENS))
    expected = unmerged(input_ids=words).logits
    torch.testing.assert_close(model(words).logits, expected, rtol=1e-5, atol=1e-5)
    for key, value in model.state_dict().items():
        moved = value - start[key]
        if key == "classifier.weight":
            assert moved.abs().min() > 0  # trained whole
        elif value.dim() == 2 and "embeddings" not in key:
            assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 2, key
        elif key != "classifier.bias":
            assert torch.equal(value, start[key]), key
    calibrated = ["calibrate", folder, "--data", tmp_path / "data.csv", "--split", "train"]
    assert run(*calibrated, "--out", tmp_path / "quantized").exit_code == 0


@pytest.mark.parametrize("killed_after", [2, 3])
def test_a_resumed_run_ends_with_the_same_bits(killed_after, new_head, tmp_path):
    assert tune(*new_head).exit_code == 0
    run = tmp_path / "run"
    finished = contents(run)
    (run / "model").rename(tmp_path / "model")
    if killed_after == 2:
        (run / "checkpoint-3" / "adapter_model.safetensors").unlink()
    result = tune(*new_head, "--resume")
    assert f"going on from checkpoint-{killed_after}" in result.output
    assert contents(run) == finished


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--refit-rows", 4], "`quanttune refit` first, then tune the folder that it writes"),
        (["--finish-steps", 2], "finish_steps rounds weights, and those of adapters are known"),
    ],
)
def test_what_adapters_cannot_do_is_refused(arguments, message, new_head, tmp_path):
    with pytest.raises(ValueError, match=message):
        tune(*new_head, *arguments)
    assert not (tmp_path / "run").exists()
