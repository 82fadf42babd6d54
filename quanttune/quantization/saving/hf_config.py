"""What the configuration of a model of transformers says of its quantization."""

import sys
from typing import Any

from .description import describe


def update_hf_config(model: Any) -> None:
    """Keep what a model of transformers writes to its config.json up to date."""
    transformers = sys.modules.get("transformers.modeling_utils")  # without it, it is none
    if not transformers:
        return
    for part in model.modules():  # the first is the whole, or what adapters hold
        if isinstance(part, transformers.PreTrainedModel):
            from .. import pretrained  # noqa: F401 whoever reads the configuration looks it up there

            part.config.quantization_config = describe(part)
            return
