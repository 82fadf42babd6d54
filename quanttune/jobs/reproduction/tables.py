"""What the tables are of: models, tasks, rows, and the budget of what is tuned."""

from collections.abc import Mapping
from dataclasses import dataclass

from .ways import LANGUAGE, QUANTTUNE, VISION

BITS = (8, 7, 6)
ALPHAS = (0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Model:
    """A model of a table; origin: its weights, for timm or the Hugging Face Hub."""

    name: str
    label: str
    origin: str


@dataclass(frozen=True)
class Task:
    """What a model is measured on.

    Args:
        metrics: names in quanttune.jobs.metrics.METRICS.
        subset: of the dataset. Tasks of one subset share what is tuned.
        splits: the first of these that the data have is measured.
    """

    name: str
    label: str
    metrics: tuple[str, ...]
    subset: str | None = None
    splits: tuple[str, ...] = ("validation",)

    @property
    def is_score(self) -> bool:
        return self.metrics == ("pearson",)


@dataclass(frozen=True)
class Table:
    """A table of the paper, and how long and in which steps its models are tuned.

    Args:
        kind: the task of transformers.
        ways: names of its rows.
        tokens: longest text; for generation the length of every row.
        calibration: rows, in ten batches.
        notes: what is to be known of its figures.
        text: columns to read; by default those that their types tell.
    """

    name: str
    title: str
    kind: str
    models: Mapping[str, Model]
    tasks: Mapping[str, Task]
    ways: tuple[str, ...]
    epochs: float
    learning_rate: float
    batch_size: int
    tokens: int
    calibration: int
    notes: tuple[str, ...]
    text: tuple[str, ...] = ()


_OMSE = (
    "OMSE: FQ-ViT's code, which the paper's rows of calibrators seem to be of, gives it zero "
    "points always. So the published figure stands beside both forms."
)
_ALPHA = (
    "QuantTune: the paper chose alpha among 0.3, 0.5 and 0.7 on a tenth of the training rows, and "
    "says neither which nor for how long it trained; its figure stands beside each."
)
_LAMBADA = (
    "LAMBADA: the paper does not say how it counts. The last token, as SmoothQuant's example does, "
    "or all tokens of the last word, as is usual: the published figures stand beside both."
)
_GLUE_NOTE = (
    "GLUE: Matthews correlation of CoLA, Pearson's of STS-B, else accuracy; the paper's average is "
    "of nine figures, with both of MNLI. A model without a head for a task is tuned first: "
    "the base is then the control."
)
_SCHEME = (
    "Rounded are weights (a scale per output channel) and activations (one scale, symmetric), "
    "residual sums too, but for what softmax returns (coverage full_no_softmax)"
)


def _by_name(*entries: tuple[str, str, str]) -> dict[str, Model]:
    return {name: Model(name, label, origin) for name, label, origin in entries}


def _glue(name: str, label: str, metric: str = "accuracy", **others: str) -> Task:
    subset, split = others.get("subset", name), others.get("split", "validation")
    return Task(name, label, (metric,), subset, (split,))


_VISION = _by_name(
    ("vit_small", "ViT-Small", "vit_small_patch16_224.augreg_in21k_ft_in1k"),
    ("vit_base", "ViT-Base", "vit_base_patch16_224.augreg_in21k_ft_in1k"),
    ("vit_large", "ViT-Large", "vit_large_patch16_224.augreg_in21k_ft_in1k"),
    ("deit_tiny", "DeiT-Tiny", "deit_tiny_patch16_224.fb_in1k"),
    ("deit_small", "DeiT-Small", "deit_small_patch16_224.fb_in1k"),
    ("deit_base", "DeiT-Base", "deit_base_patch16_224.fb_in1k"),
    ("swin_tiny", "Swin-Tiny", "swin_tiny_patch4_window7_224.ms_in1k"),
    ("swin_small", "Swin-Small", "swin_small_patch4_window7_224.ms_in1k"),
    ("swin_base", "Swin-Base", "swin_base_patch4_window7_224.ms_in1k"),
)
_GLUE = (
    _glue("cola", "CoLA", "matthews_correlation"),
    _glue("sst2", "SST-2"),
    _glue("mrpc", "MRPC"),
    _glue("stsb", "STS-B", "pearson"),
    _glue("qqp", "QQP"),
    _glue("mnli_m", "MNLI-m", subset="mnli", split="validation_matched"),
    _glue("mnli_mm", "MNLI-mm", subset="mnli", split="validation_mismatched"),
    _glue("qnli", "QNLI"),
    _glue("rte", "RTE"),
)
TABLES = {
    table.name: table
    for table in (
        Table(
            "table1",
            "Table 1: ImageNet-1K, top-1 accuracy",
            "image-classification",
            _VISION,
            {"imagenet": Task("imagenet", "ImageNet", ("accuracy",))},
            (*VISION, QUANTTUNE),
            epochs=1,
            learning_rate=1e-5,
            batch_size=64,
            tokens=128,
            calibration=1000,
            notes=(
                f"{_SCHEME}; FQ-ViT and 'PTQ4ViT, all rounded': that too (full); PTQ4ViT and "
                "Ranking: inputs of Linear and of attention's products alone (linear).",
                _OMSE,
                _ALPHA,
            ),
        ),
        Table(
            "table3",
            "Table 3: LAMBADA, accuracy",
            "text-generation",
            _by_name(("opt_350m", "OPT-350M", "facebook/opt-350m")),
            {
                "lambada": Task(
                    "lambada",
                    "LAMBADA",
                    ("last_token", "last_word"),
                    splits=("test", "validation"),
                )
            },
            (*LANGUAGE, QUANTTUNE),
            epochs=1,
            learning_rate=1e-5,
            batch_size=8,
            tokens=512,
            calibration=320,
            notes=(f"{_SCHEME}.", _LAMBADA, _OMSE, _ALPHA),
            text=("text",),  # beside which LAMBADA has the book's genre
        ),
        Table(
            "table4",
            "Table 4: GLUE",
            "text-classification",
            _by_name(("bert_base", "BERT-Base", "google-bert/bert-base-uncased")),
            {task.name: task for task in _GLUE},
            (*LANGUAGE, QUANTTUNE),
            epochs=3,
            learning_rate=2e-5,
            batch_size=32,
            tokens=128,
            calibration=320,
            notes=(f"{_SCHEME}.", _GLUE_NOTE, _OMSE, _ALPHA),
        ),
    )
}
