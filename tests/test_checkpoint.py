"""Checkpoints of models that transformers saves under other names than it trains them under."""

import copy
import json

import pytest
import torch
from models import TOKENS, WORDS
from oracle import assert_same_bits, quiet
from safetensors.torch import load_file, save_file
from test_trainer import Interrupt, parameters, trainer
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from quanttune import attach
from quanttune.trainer.checkpoint import load_weights

pytestmark = [
    quiet,
    # a CPU has no use for pinned memory
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore:.*multiply by matrices that they hold in one parameter"),
]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IMAGES = {"image_size": 16, "patch_size": 8, "num_labels": 2}
TEXTS = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def vit(**options):
    return ViTForImageClassification(ViTConfig(**SIZES, **IMAGES, **options))


def deit():
    return DeiTForImageClassification(DeiTConfig(**SIZES, **IMAGES))


def swin():
    sizes = {"patch_size": 4, "window_size": 2, "embed_dim": 8, "depths": [2, 1]}
    return SwinForImageClassification(SwinConfig(**{**IMAGES, **sizes}, num_heads=[1, 2]))


def timm():
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=shape, num_labels=2)
    )


def bert():
    return BertForSequenceClassification(BertConfig(**SIZES, **TEXTS))


def roberta():
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, **TEXTS))


def opt():
    """Return a model with a tied head."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32}
    return OPTForCausalLM(OPTConfig(**{**SIZES, **TEXTS, **sizes}, max_position_embeddings=16))


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, **TEXTS, num_key_value_heads=1))


def t5():
    """Return a model of which three names are tied to a fourth."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=WORDS, decoder_start_token_id=0, tie_word_embeddings=True, **sizes)
    )


def mixtral():
    """Return a model that saves each of its experts, which are one tensor."""
    sizes = {"num_key_value_heads": 1, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **TEXTS, **sizes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(**TEXTS, n_embd=16, n_layer=2, n_head=2, n_positions=16))


VISION = [vit, deit, swin, timm]
each_model = pytest.mark.parametrize(
    "make",
    [*VISION, bert, roberta, opt, llama, t5, mixtral, gpt2],
    ids=lambda make: make.__name__,
)


def rows(make):
    """Return rows for a model, with one label each or as many as there are words."""
    if make in VISION:
        pixels = torch.randn(12, 3, 16, 16)
        return [{"pixel_values": x, "labels": torch.tensor(i % 2)} for i, x in enumerate(pixels)]
    words = torch.randint(3, WORDS, (12, TOKENS))
    one = make in (bert, roberta)
    return [{"input_ids": w, "labels": w[0] % 2 if one else w} for w in words]


RUN = {
    "max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2,
    "optim": "adamw_torch", "learning_rate": 1e-2,
}  # fmt: skip


@each_model
def test_killed_and_resumed_it_ends_with_the_same_bits(make, tmp_path, caplog):
    start, data = make(), rows(make)
    whole = trainer(tmp_path / "whole", copy.deepcopy(start), data, **RUN)
    whole.train()
    first = trainer(tmp_path / "parts", copy.deepcopy(start), data, **RUN)
    first.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(tmp_path / "parts", make(), data, **RUN)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert_same_bits(parameters(second.model), parameters(whole.model))
    assert "missing keys" not in caplog.text  # as if tied weights were


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [vit, mixtral, opt], ids=lambda make: make.__name__)
def test_shards_and_types_are_loaded_as_they_were(make, dtype, tmp_path):
    model = make().to(dtype)
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    for p in model.parameters():
        p.data.zero_()
    load_weights(model, tmp_path)
    assert_same_bits(dict(model.state_dict()), expected)


def test_a_model_of_two_types_is_loaded(tmp_path):
    model = vit().to(torch.bfloat16)
    model.classifier.float()
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    for p in model.parameters():
        p.data.zero_()
    load_weights(model, tmp_path)
    assert_same_bits(dict(model.state_dict()), expected)


def test_the_names_of_a_compiled_model_are_known(tmp_path):
    model, other = vit(), vit()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    names = {f"_orig_mod.{name}": x for name, x in state.items()}
    save_file(names, tmp_path / "model.safetensors", {"format": "pt"})
    load_weights(other, tmp_path)
    assert_same_bits(parameters(other), parameters(model))


def drop(state, name):
    del state[name]


def rename(state, name):
    state[f"{name}_"] = state.pop(name)


def reshape(state, name):
    state[name] = state[name][None].clone()


@each_model
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "is missing|parts of some weights"),  # an expert is a part of a tensor
        (rename, "is missing|parts of some weights"),
        (reshape, "has shape|parts of some weights"),
    ],
)
def test_what_is_not_the_whole_model_is_refused(make, change, message, tmp_path):
    model = make()
    before = parameters(model)
    make().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    names = [name for name in sorted(state) if make is not mixtral or "expert" in name]
    change(state, names[len(names) // 2])
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"nothing was loaded: .*({message})"):
        load_weights(model, tmp_path)
    assert_same_bits(parameters(model), before)


def test_the_trainer_refuses_what_is_not_the_whole_model(tmp_path):
    vit().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    drop(state, "vit.encoder.layer.1.attention.attention.query.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    run = trainer(tmp_path / "run", vit(), rows(vit))
    with pytest.raises(ValueError, match=r"vit\.layers\.1\.attention\.q_proj\.weight is missing"):
        run.train(resume_from_checkpoint=str(tmp_path))


def test_a_damaged_file_is_named(tmp_path):
    vit().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_weights(vit(), tmp_path)


def test_a_lost_shard_is_named(tmp_path):
    vit().save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    lost = sorted(set(index["weight_map"].values()))[-1]
    (tmp_path / lost).unlink()
    with pytest.raises(ValueError, match=f"{lost} is damaged"):
        load_weights(vit(), tmp_path)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}',
     '{"weight_map": {"a": "../model.safetensors"}}'],
)  # fmt: skip
def test_a_damaged_index_is_named(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        load_weights(nn.Linear(3, 3), tmp_path)


@pytest.mark.parametrize("kept", [0, 100, -9])
def test_a_damaged_file_of_torch_is_named(kept, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(nn.Linear(3, 3).state_dict(), file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged"):
        load_weights(nn.Linear(3, 3), tmp_path)


class Plain(nn.Module):
    """A model of nobody's library, with a weight that has two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_a_model_of_another_library_is_loaded_or_refused(tmp_path):
    model, other = Plain(), Plain()
    state = {name: x for name, x in model.state_dict().items() if name != "second.weight"}
    save_file(state, tmp_path / "model.safetensors")
    load_weights(other, tmp_path)
    assert_same_bits(parameters(other), parameters(model))
    save_file({**state, "third": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"this Plain, .*: third is not expected"):
        load_weights(other, tmp_path)
    del state["second.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"second\.bias is missing"):
        load_weights(other, tmp_path)


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    data = rows(vit)
    options = {
        **RUN, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    run = trainer(tmp_path, vit(), data, measured=data, **options)
    losses = iter([1.0, 2.0])  # the first checkpoint is the best
    evaluate = run.evaluate
    run.evaluate = lambda *rest, **named: {**evaluate(*rest, **named), "eval_loss": next(losses)}
    run.train()
    best, last = (
        ViTForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}")
        for step in (2, 4)
    )
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert_same_bits(parameters(run.model), parameters(best))
    assert not torch.equal(best.vit.layernorm.weight, last.vit.layernorm.weight)


def test_more_steps_go_on_as_if_there_had_been_so_many(tmp_path):
    """By a plain loop from the checkpoint: the new schedules of the rate and of alpha."""
    data = rows(vit)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options = {
        "optim": "sgd", "lr_scheduler_type": "linear", "per_device_train_batch_size": 12,
        "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    trainer(tmp_path, vit(**still), data, **{**options, "max_steps": 2}).train()
    run = trainer(tmp_path, vit(**still), data, **{**options, "max_steps": 5})
    run.train(resume_from_checkpoint=True)
    plain = ViTForImageClassification.from_pretrained(tmp_path / "checkpoint-2").train()
    tuner = attach(plain, alpha=0.3, total_steps=5)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    for step in (2, 3, 4):
        tuner.resume(step)
        plain.zero_grad()
        tuner.combine(plain(**batch).loss).backward()
        for p in plain.parameters():
            p.data -= 0.1 * (1 - step / 5) * p.grad
    for name, p in plain.named_parameters():
        torch.testing.assert_close(run.model.get_parameter(name), p, rtol=1e-4, atol=1e-6)
    logs = [log for log in run.state.log_history if "alpha" in log]
    assert [log["alpha"] for log in logs] == pytest.approx([0.15, 0.0, 0.12, 0.06, 0.0])
