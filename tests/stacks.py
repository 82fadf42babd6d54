"""Small models of several stacks whose sequences are all of one length, padded differently."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import Tensor, nn

LENGTH = 6
SOURCE, TARGET = (3, 6, 4), (5, 2, 6)  # tokens that count, of each sample
WORDS, WIDTH = 50, 16


class Padded(NamedTuple):
    """A model, a padded batch for it, and its samples one by one without padding."""

    model: nn.Module
    batch: dict[str, Tensor]
    alone: list[dict[str, Tensor]]


def words() -> Tensor:
    return torch.randint(5, WORDS, (len(SOURCE), LENGTH))


def mask_of(lengths: tuple[int, ...]) -> Tensor:
    return (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()


def padded(model: nn.Module, batch: dict[str, Tensor], **lengths: tuple[int, ...]) -> Padded:
    """Return a model and a batch with masks; lengths: of an argument, by its name."""
    with torch.no_grad():  # fresh weights are small: all would be alike
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    alone = [
        {
            key: x[i : i + 1, : lengths[key][i]] if key in lengths else x[i : i + 1]
            for key, x in batch.items()
        }
        for i in range(len(SOURCE))
    ]
    masks = {f"{key[:-9]}attention_mask": mask_of(length) for key, length in lengths.items()}
    return Padded(model, {**batch, **masks}, alone)


def _translation(model: nn.Module) -> Padded:
    batch = {"input_ids": words(), "decoder_input_ids": words()}
    return padded(model, batch, input_ids=SOURCE, decoder_input_ids=TARGET)


_SIZES = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
_BART: dict[str, Any] = {
    **_SIZES,
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "use_cache": False,
}


def bart() -> Padded:
    return _translation(tf.BartForConditionalGeneration(tf.BartConfig(**_BART)))


def marian() -> Padded:
    config = tf.MarianConfig(**_BART, pad_token_id=1, decoder_start_token_id=1)
    return _translation(tf.MarianMTModel(config))


def t5() -> Padded:
    sizes = {"vocab_size": WORDS, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_heads": 2}
    options = {"num_layers": 1, "dropout_rate": 0.0, "use_cache": False}
    return _translation(tf.T5ForConditionalGeneration(tf.T5Config(**sizes, **options)))


_LAYER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def clip() -> Padded:
    """Return a dual encoder; padding before the end, since it looks for the last word."""
    text = {**_LAYER, "vocab_size": WORDS, "max_position_embeddings": 16, "eos_token_id": 4}
    vision = {**_LAYER, "image_size": 8, "patch_size": 4}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    batch = {"input_ids": words()[:, :5], "pixel_values": torch.randn(3, 3, 8, 8)}
    lengths = (3, 5, 4)
    for row, length in zip(batch["input_ids"], lengths, strict=True):
        row[length - 1 :] = 4
    made = padded(model, batch, input_ids=lengths)
    return made._replace(batch={**batch, "attention_mask": made.batch["attention_mask"][:, :5]})


def captions() -> Padded:
    """Return a ViT that a BERT describes: patches have no mask, words do."""
    encoder = tf.ViTConfig(**_LAYER, image_size=8, patch_size=4, **_NO_DROPOUT)
    decoder = tf.BertConfig(
        **_LAYER, **_NO_DROPOUT, vocab_size=WORDS, max_position_embeddings=16, is_decoder=True,
        add_cross_attention=True, use_cache=False,
    )  # fmt: skip
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = tf.VisionEncoderDecoderModel(config)
    model.encoder.pooler = None  # whose output nobody reads
    batch = {"pixel_values": torch.randn(3, 3, 8, 8), "decoder_input_ids": words()[:, :5]}
    made = padded(model, batch, decoder_input_ids=(3, 5, 2))
    mask = made.batch["decoder_attention_mask"][:, :5]
    return made._replace(batch={**batch, "decoder_attention_mask": mask})


def llava() -> Padded:
    """Return a language model that reads as many features of an image as it has words."""
    vision = tf.CLIPVisionConfig(**_LAYER, image_size=8, patch_size=4)
    text = tf.LlamaConfig(
        **_LAYER, vocab_size=WORDS, use_cache=False, num_key_value_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=1, image_seq_length=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    model = tf.LlavaForConditionalGeneration(config)
    model.model.vision_tower.post_layernorm = nn.Identity()  # whose output nobody reads
    ids = words()[:, :5]
    ids[:, :4] = 1
    batch = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 8, 8)}
    made = padded(model, batch, input_ids=(4, 5, 4))
    return made._replace(batch={**batch, "attention_mask": made.batch["attention_mask"][:, :5]})


STACKS: dict[str, Callable[[], Padded]] = {
    "bart": bart, "marian": marian, "t5": t5, "clip": clip, "captions": captions, "llava": llava,
}  # fmt: skip
