"""What is done to a model so that rounding it costs less, a file per kind; a new method is a class
in a table.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from .adaround import AdaRound as AdaRound
from .apq_vit import APQViT as APQViT
from .aweq import AWEQ as AWEQ
from .awq import AWQ as AWQ
from .bias_correction import BiasCorrection as BiasCorrection
from .erq import ERQ as ERQ
from .fq_vit import FQViT as FQViT
from .gptq import GPTQ as GPTQ
from .gwq import GWQ as GWQ
from .llm_int8 import LLMInt8 as LLMInt8
from .method import Equalization as Equalization
from .method import Method as Method
from .method import Regridding as Regridding
from .method import Rounding as Rounding
from .noisyquant import NoisyQuant as NoisyQuant
from .oac import OAC as OAC
from .outlier_suppression import OutlierSuppression as OutlierSuppression
from .peg import PEG as PEG
from .prequant import PreQuant as PreQuant
from .ptq4vit import BasePTQ as BasePTQ
from .ptq4vit import PTQ4ViT as PTQ4ViT
from .qera import QERA as QERA
from .ranking import Ranking as Ranking
from .repq import RepQ as RepQ
from .rotate import Rotate as Rotate
from .smooth_inputs import SmoothInputs as SmoothInputs
from .smoothquant import SmoothQuant as SmoothQuant
from .weight_clipping import WeightClipping as WeightClipping

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {
        method.name: method
        for method in (
            SmoothQuant,
            OutlierSuppression,
            AWEQ,
            AWQ,
            RepQ,
            SmoothInputs,
            Rotate,
            FQViT,
            NoisyQuant,
            PEG,
            LLMInt8,
            BiasCorrection,
            WeightClipping,
            AdaRound,
            GPTQ,
            OAC,
            ERQ,
            QERA,
            GWQ,
            PreQuant,
            BasePTQ,
            PTQ4ViT,
            APQViT,
            Ranking,
        )
    }
)


def methods_of(
    chosen: Iterable[str | Method],
) -> tuple[list[Equalization], list[Regridding | Rounding]]:
    """Return the methods that are chosen by name or with their options, by when they act.

    Raises:
        ValueError: a name is unknown, one comes after what acts later, or there are two roundings.
    """
    if isinstance(chosen, str | Method):
        raise ValueError(f'methods must be a list, such as ["erq"], got {chosen!r}')
    methods = [_method_of(choice) for choice in chosen]
    equalizations = [method for method in methods if isinstance(method, Equalization)]
    regriddings = [method for method in methods if isinstance(method, Regridding)]
    roundings = [method for method in methods if isinstance(method, Rounding)]
    if methods != [*equalizations, *regriddings, *roundings]:
        order = ", ".join(method.name for method in (*equalizations, *regriddings, *roundings))
        raise ValueError(f"what equalizes the float model comes before what rounds it: {order}")
    if len(roundings) > 1:
        names = " and ".join(method.name for method in roundings)
        raise ValueError(f"{names} both choose the codes of the weights: take one of them")
    if (keeping := [m.name for m in regriddings if m.keeps_weights]) and roundings:
        raise ValueError(
            f"{keeping[0]} multiplies with weights as they were, which {roundings[0].name} rounds "
            "for good: take one of them"
        )
    return equalizations, [*regriddings, *roundings]


def roundings_in(names: Iterable[str]) -> list[str]:
    """Return those of the names whose methods choose the codes of weights."""
    return [name for name in names if issubclass(METHODS.get(name, Method), Rounding)]


def _method_of(choice: str | Method) -> Method:
    if isinstance(choice, Method):
        return choice
    if choice not in METHODS:
        raise ValueError(
            f"methods must be of {', '.join(METHODS)}, or objects such as GPTQ(act_order=True), "
            f"got {choice!r}"
        )
    return METHODS[choice]()
