"""One float pass over the sites: their statistics, and where their largest values are."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..fused_observer import observe
from ..quantization.modules import QuantizedConvolution
from ..quantization.token_mask import select
from ..reference import Statistics
from .massive import IdOf, Massive
from .probes import watch


@dataclass(frozen=True)
class Peak:
    """The largest magnitude of one sample at a site."""

    value: float
    sample: int  # in the order of the data
    token: int  # position of the token, or of the pixel
    channel: int


@dataclass
class SiteSurvey:
    """What a site holds in float, over all of the data."""

    site: str
    aliases: list[str] = field(default_factory=list)  # sites with the same tensor
    elements: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    median: float = 0.0  # of the magnitudes; a mean over the samples
    ratio: float = 0.0  # the outlier loss, eq. 2; a mean over the samples
    variance: float = 0.0  # of the values, about their mean
    kurtosis: float = 0.0  # 3 for a Gaussian; a mean over the samples
    peaks: list[Peak] = field(default_factory=list)  # one per sample
    massive: Massive = field(default_factory=Massive)

    @property
    def absmax(self) -> float:
        return max(-self.low, self.high)

    def common(self, part: str) -> tuple[int, float]:
        """Return the "channel" or "token" that most samples peak at, and the share of those."""
        (index, times), *_ = Counter(getattr(peak, part) for peak in self.peaks).most_common(1)
        return index, times / len(self.peaks)


def survey(quantized: nn.Module, data: Iterable[Any]) -> dict[str, SiteSurvey]:
    """Return what each site of a quantized model holds when the model computes in float.

    Sites that hold the same tensor, such as a LayerNorm's output and the inputs of the Linear
    modules behind it, are one: the first, in the order of the forward, and its aliases.
    """
    surveyors: dict[str, _Surveyor] = {}
    modules = dict(quantized.named_modules())
    batches = _Batches(data)

    def see(site: str, x: Tensor, counted: Tensor | None) -> None:
        if x.numel():
            if site not in surveyors:
                surveyors[site] = _Surveyor(site, modules[site.rpartition(".")[0]])
            surveyors[site].update(x, counted, batches.rows, batches.first)

    watch(quantized, batches, see)
    found: dict[tuple[Any, ...], SiteSurvey] = {}
    for site, surveyor in surveyors.items():
        first = found.setdefault(surveyor.fingerprint, surveyor.survey)
        if first.site != site:
            first.aliases.append(site)
    return {one.site: one for one in found.values()}


def rows_of(batch: Any) -> int:
    """Return how many samples a batch has."""
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()))
    elif isinstance(batch, (tuple, list)):
        batch = batch[0]
    return len(batch)


def first_rows(batch: Any, rows: int) -> Any:
    """Return the first samples of a batch."""
    if isinstance(batch, Mapping):
        return {name: x[:rows] for name, x in batch.items()}
    return batch[0][:rows] if isinstance(batch, (tuple, list)) else batch[:rows]


class _Batches:
    """The data, and which of its rows the model sees right now."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data
        self.first = self.rows = 0

    def __iter__(self) -> Any:
        for batch in self._data:
            self.rows = rows_of(batch)
            yield batch
            self.first += self.rows


class _Surveyor:
    def __init__(self, site: str, owner: nn.Module) -> None:
        self.survey = SiteSurvey(site)
        self._channels_first = isinstance(owner, QuantizedConvolution)
        # those of attention have heads, and no channels that others share
        self._has_channels = not site.rpartition(".")[2].startswith(("attention", "product"))
        self._samples = 0
        self._mean = self._squares = 0.0

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Equal for one tensor seen twice, whatever its shape and strides."""
        found = self.survey
        return found.elements, found.low, found.high, f"{self._squares:.6g}"

    def update(self, x: Tensor, counted: Tensor | None, rows: int, first: int) -> None:
        found = self.survey
        values = select(x, counted)
        if not values.numel():
            return
        low, high = values.aminmax()
        found.low, found.high = min(found.low, low.item()), max(found.high, high.item())
        has_samples = x.shape[0] % rows == 0  # a table of positions has none
        samples = rows if has_samples else 1
        medians = []
        for part, parts in _samples(x, counted, samples):
            statistics = observe(part, parts)[1]
            medians += self._merge(statistics, part.numel() // parts, _kurtosis(part, parts))
        if has_samples and self._has_channels:
            shown = x if counted is None else x.masked_fill(~counted, 0)
            found.peaks += self._peaks(shown, rows, first)
            self._find_massive(x, counted, medians, rows, first)

    def _merge(self, found: Statistics, elements: int, kurtosis: Tensor) -> list[float]:
        columns = map(Tensor.tolist, (*found, kurtosis))
        for _, median, mean, deviation, ratio, tail in zip(*columns, strict=True):
            self._samples += 1
            self.survey.median += (median - self.survey.median) / self._samples
            self.survey.kurtosis += (tail - self.survey.kurtosis) / self._samples
            self.survey.ratio += (ratio - self.survey.ratio) / self._samples
            self._add(elements, mean, deviation**2 * (elements - 1))
        return found.median.tolist()  # type: ignore[no-any-return]

    def _add(self, elements: int, mean: float, squares: float) -> None:
        """Add a sample to the mean and to the sum of squares about it (Chan et al.)."""
        before = self.survey.elements
        self.survey.elements += elements
        away = mean - self._mean
        self._squares += squares + away**2 * before * elements / self.survey.elements
        self._mean += away * elements / self.survey.elements
        self.survey.variance = self._squares / self.survey.elements

    def _find_massive(
        self, x: Tensor, counted: Tensor | None, medians: list[float], rows: int, first: int
    ) -> None:
        if self._channels_first or x.dim() < 2:
            return
        tokens = x.reshape(rows, -1, x.shape[-1])
        real = x.new_ones(tokens.shape[:2], dtype=torch.bool)
        if counted is not None:
            real = counted.expand_as(x).reshape(tokens.shape).any(-1)
        known = iter(medians)  # samples of padding alone have none
        found = [next(known) if any_real else 0.0 for any_real in real.any(-1).tolist()]
        self.survey.massive.update(tokens, real, found, first)

    def _peaks(self, x: Tensor, rows: int, first: int) -> list[Peak]:
        if self._channels_first:
            x = x.movedim(1, -1)
        channels = x.shape[-1] if x.dim() > 1 else 1
        value, place = x.reshape(rows, -1).abs().max(1)
        peaks = zip(value.tolist(), place.tolist(), strict=True)
        return [Peak(v, first + row, *divmod(at, channels)) for row, (v, at) in enumerate(peaks)]


def _kurtosis(x: Tensor, samples: int) -> Tensor:
    """Return the fourth moment of each sample about its mean, in squares of its variance.

    Of a constant it is 0. Bondarenko et al. (arXiv 2306.12929) report it; their code adds 1e-6 to
    the square, which a tensor of small values would not survive.
    """
    rows = x.reshape(samples, -1).float()
    squares = (rows - rows.mean(1, keepdim=True)).square_()
    variance = squares.mean(1)
    fourth = squares.square_().mean(1)
    return torch.where(variance > 0, fourth / variance.square(), 0.0).nan_to_num()


def _samples(x: Tensor, counted: Tensor | None, samples: int) -> Iterator[tuple[Tensor, int]]:
    """Yield tensors and how many samples each holds: all in one, unless padding is left out."""
    if counted is None:
        yield x, samples
        return
    rows = zip(x.reshape(samples, -1), counted.expand_as(x).reshape(samples, -1), strict=True)
    for values, where in rows:
        if where.any():
            yield values[where], 1


LARGEST = 3  # peaks that are named, per site


def describe_outliers(
    found: SiteSurvey, data: Sequence[Any], tokenizer: Any = None
) -> dict[str, Any] | None:
    """Return where most samples have their largest magnitude, and the largest of all.

    None for a site without samples, or with heads, whose channels mean nothing to the others.
    """
    if not found.peaks:
        return None
    channel, channel_share = found.common("channel")
    token, token_share = found.common("token")
    largest = sorted(found.peaks, key=lambda peak: -peak.value)[:LARGEST]
    return {
        "channel": channel,
        "channel_share": channel_share,
        "token": token,
        "token_share": token_share,
        "largest": [{**asdict(peak), "text": _text(peak, data, tokenizer)} for peak in largest],
    }


def _text(peak: Peak, data: Sequence[Any], tokenizer: Any) -> str | None:
    """Return the token of a peak, where the data are token ids and there is a tokenizer."""
    return text_of(ids_of(data)(peak.sample, peak.token), tokenizer)


def text_of(token_id: int | None, tokenizer: Any) -> str | None:
    """Return a token as its tokenizer spells it, if both are known."""
    if token_id is None or tokenizer is None:
        return None
    return str(tokenizer.convert_ids_to_tokens(token_id))


def ids_of(data: Sequence[Any]) -> IdOf:
    """Return what tells the id of a token by sample and position: None, where data have none."""
    rows: list[Tensor] = []
    for batch in data:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        rows += [torch.empty(0)] * rows_of(batch) if ids is None else list(ids)

    def id_of(sample: int, token: int) -> int | None:
        return int(rows[sample][token]) if token < len(rows[sample]) else None

    return id_of
