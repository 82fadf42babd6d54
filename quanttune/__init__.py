"""Outlier-driven fine-tuning that makes Transformers ready for plain integer quantization.

observe (kernels) -> refit -> tune (loss, schedule) -> quantize (calibrate, simulate) -> analyze
-> export (ONNX) -> verify; auto chooses among what needs no training
"""

# torch first: the C++ kernels run on the OpenMP threads that it loads
import torch as _torch  # noqa: F401

from . import fused_observer as fused_observer
from . import reference as reference
from .choosing.auto import auto as auto
from .deploy.compressed_tensors import (
    export_compressed_tensors as export_compressed_tensors,
)
from .deploy.onnx_export import export_onnx as export_onnx
from .deploy.torch_export import export_torch as export_torch
from .deploy.torchao_folder import export_torchao as export_torchao
from .deploy.verification.verify import verify as verify
from .distillation.distiller import distill as distill
from .distillation.rectification import rectify_attention as rectify_attention
from .fake_quantizer import fake_quant as fake_quant
from .fake_quantizer import fake_quant_ as fake_quant_
from .ops import backends as backends
from .quantization.bit_allocation import allocate_bits as allocate_bits
from .quantization.learned_ranges import freeze_scales as freeze_scales
from .quantization.learned_ranges import learn_scales as learn_scales
from .quantization.outliers import learn_outliers as learn_outliers
from .quantization.prefixes.prefix import prefix as prefix
from .quantization.requantization import requantize as requantize
from .quantization.rotation import rotate as rotate
from .quantization.saving.safetensors_file import load as load
from .quantization.saving.safetensors_file import save as save
from .quantization.simulation import quantize as quantize
from .quantization.summary import summary as summary
from .refitting.refit import refit as refit
from .synthesis.images import synthesize_images as synthesize_images
from .tuning.attach import attach as attach
from .tuning.quiet_attention import clip_softmax as clip_softmax
from .tuning.quiet_attention import gate_attention as gate_attention
from .tuning.tuner import Tuner as Tuner
