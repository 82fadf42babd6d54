"""Import this module, and `from_pretrained` of transformers loads what a quantized model saved.

`save_pretrained` needs nothing: `quantize` puts a description into the model's configuration.
"""

from contextlib import ExitStack
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .saving.description import check_loaded, from_description
from .saving.schema import METHOD, check


@register_quantization_config(METHOD)
class QuantTuneConfig(QuantizationConfigMixin):
    """The `quantization_config` of a config.json."""

    def __init__(self, **description: Any) -> None:
        check(description)
        self.__dict__.update(description)


@register_quantizer(METHOD)
class QuantTuneQuantizer(HfQuantizer):
    """What `from_pretrained` asks to make a model quantized before its tensors are loaded."""

    requires_calibration = True
    is_trainable = True
    is_qat_trainable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        from_description(model, self.quantization_config.to_dict(), ExitStack())

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        check_loaded(model)
