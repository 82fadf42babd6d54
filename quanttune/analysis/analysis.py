"""Why a model is hard to quantize: the figures of section 3 of the paper, as plain data."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

from torch import Tensor, nn

from ..environment import environment
from .blocks import OUTSIDE, block_of, block_ranges, find_blocks
from .channels import channel_groups
from .errors import ErrorSplit
from .probes import sites_of, watch
from .sensitivity import sensitivity
from .sinks import attention_sinks
from .subject import Request, Subject
from .survey import SiteSurvey, describe_outliers, first_rows, ids_of, survey, text_of
from .sweep import SiteErrors, Trial, Trials, site_errors, threshold

SENSITIVITY_ROWS = 16  # it takes a forward for each tensor, and a few rows rank them
_SENSITIVITY_UNITS = 20  # how long that takes, in units of one trial

Way = TypeVar("Way", str, float)
Progress = Callable[[str, float], None]  # what comes next, and how many units were done


def units(request: Request, models: int = 1) -> float:
    """Return how much work `analyze` will report."""
    return len(request.thresholds) + len(request.calibrators) + 3 + _SENSITIVITY_UNITS + models


def analyze(
    subject: Subject,
    request: Request,
    others: Mapping[str, nn.Module] | None = None,
    progress: Progress = lambda description, units: None,
) -> dict[str, Any]:
    """Return what the report of a model shows, as plain data for JSON.

    others: models to compare ranges and quality with, such as the tuned one, by name.
    """
    began = time.monotonic()
    trials = Trials(subject.model, subject.data, subject.evaluate, **request.scheme)
    quantized = trials.minmax
    _check_sites(request.sites, quantized)
    surveys = survey(quantized, subject.data)
    sweep = _tried(trials, {p: threshold(p) for p in request.thresholds}, progress)
    best = max(sweep, key=lambda percent: sweep[percent].value)
    calibrators = _tried(trials, {name: name for name in request.calibrators}, progress)
    progress("splitting the errors", 1)
    errors = site_errors(quantized, subject.data, surveys, list(sweep.values()))
    progress("attention sinks", 1)
    sinks = attention_sinks(subject.model, subject.data, ids_of(subject.data))
    progress("one tensor at a time", 1)
    sites = _sites(subject, quantized, surveys, errors)
    parts = _sensitivity(subject, quantized, surveys, sites, progress)
    drawn = request.sites or _widest_and_last(sites)
    models = []
    for name, model in {subject.name: subject.model, **(others or {})}.items():
        if model is not subject.model:
            trials = Trials(model, subject.data, subject.evaluate, **request.scheme)
        models.append(_model(name, model, trials, subject, best, drawn))
        progress(f"ranges of {name}", 1)
    return {
        "analysis": subject.name,
        "metric": subject.metric,
        "facts": dict(subject.facts),
        "scheme": {**request.scheme, "weights": "channel"},
        "best": best,
        "sweep": [_point(percent, i, sweep, sites) for i, percent in enumerate(sweep)],
        "calibrators": {name: trial.value for name, trial in calibrators.items()},
        "models": models,
        "sites": sites,
        "sinks": [_named(sink, subject.tokenizer) for sink in sinks],
        "errors": parts,
        "environment": environment(),
        "seconds": round(time.monotonic() - began, 1),
    }


def _check_sites(wanted: Sequence[str], quantized: nn.Module) -> None:
    sites = sites_of(quantized)
    for site in wanted:
        if site not in sites:
            close = get_close_matches(site, sites, cutoff=0.3) or list(sites)[:3]
            raise ValueError(f"no tensor is called {site!r}: did you mean {', '.join(close)}?")


def _tried(trials: Trials, calibrators: Mapping[Way, Any], progress: Progress) -> dict[Way, Trial]:
    found = {}
    for way, calibrator in calibrators.items():
        name = f"calibrator {way}" if isinstance(way, str) else f"threshold {way:.6g} %"
        progress(name, 0)
        found[way] = trials[calibrator]
        progress(name, 1)
    return found


def _sites(
    subject: Subject,
    quantized: nn.Module,
    surveys: Mapping[str, SiteSurvey],
    errors: Mapping[str, SiteErrors],
) -> list[dict[str, Any]]:
    blocks, quantizers = find_blocks(subject.model), sites_of(quantized)
    id_of = ids_of(subject.data)
    return [
        {
            "site": site,
            "aliases": found.aliases,
            "kind": quantizers[site].kind,
            "block": block_of(site, blocks),
            "elements": found.elements,
            "absmax": found.absmax,
            "median": found.median,
            "ratio": found.ratio,
            "variance": found.variance,
            "kurtosis": found.kurtosis,
            "split": [asdict(split) for split in errors[site].split],
            "divergence": errors[site].divergence,
            "outliers": describe_outliers(found, subject.data, subject.tokenizer),
            "massive": _named(found.massive.describe(found.median, id_of), subject.tokenizer),
        }
        for site, found in surveys.items()
    ]


def _named(found: dict[str, Any] | None, tokenizer: Any) -> dict[str, Any] | None:
    """Add the text of the token that is named by its id."""
    return found and {**found, "text": text_of(found["id"], tokenizer)}


def _sensitivity(
    subject: Subject,
    quantized: nn.Module,
    surveys: Mapping[str, SiteSurvey],
    sites: list[dict[str, Any]],
    progress: Progress,
) -> dict[str, Any]:
    """Add to each site what quantizing it alone costs; return the same of the larger parts."""
    kinds = {site["site"]: site["kind"] for site in sites}
    batches = [first_rows(subject.data[0], SENSITIVITY_ROWS)]
    share = _SENSITIVITY_UNITS / (len(sites) + len(set(kinds.values())) + 3)
    advance = partial(progress, "one tensor at a time", share)
    found = sensitivity(quantized, batches, surveys, kinds, advance)
    for site in sites:
        site["sensitivity"] = found.sites[site["site"]]
    return {key: value for key, value in asdict(found).items() if key != "sites"}


def _point(
    percent: float, index: int, sweep: Mapping[float, Trial], sites: list[dict[str, Any]]
) -> dict[str, float]:
    """Return one threshold of Fig. 3, with means over the tensors of MSE over variance."""
    splits = [site["split"][index] for site in sites]
    means = {
        part: fmean(split[part] / _energy(site) for split, site in zip(splits, sites, strict=True))
        for part in ("saturation", "precision")
    }
    shares = [ErrorSplit(**split).precision_share for split in splits]
    return {
        "percent": percent,
        "value": sweep[percent].value,
        **means,
        "precision_share": fmean(shares),
    }


def _energy(site: Mapping[str, Any]) -> float:
    return float(site["variance"] * site["elements"]) or 1.0  # a constant tensor has no error


def _widest_and_last(sites: list[dict[str, Any]]) -> list[str]:
    """Return the residual sum of the widest range, and the last one of a block."""
    sums = [site for site in sites if site["kind"] == "residual"] or sites
    inside = [site for site in sums if site["block"] != OUTSIDE] or sums
    widest = max(sums, key=lambda site: site["absmax"])
    return list(dict.fromkeys([widest["site"], inside[-1]["site"]]))


def _model(
    name: str,
    model: nn.Module,
    trials: Trials,
    subject: Subject,
    percent: float,
    drawn: Sequence[str],
) -> dict[str, Any]:
    values: dict[str, list[Tensor]] = {site: [] for site in drawn}

    def see(site: str, x: Tensor, counted: Tensor | None) -> None:
        if site in values:
            rows = slice(None) if counted is None else counted.any(-1).expand(x.shape[:-1])
            values[site].append(x[rows])

    watch(trials.minmax, subject.data, see)
    if not all(values.values()):
        raise ValueError(f"{name} has other tensors than {subject.name}: they cannot be compared")
    ranges = block_ranges(model, subject.data, percent)
    return {
        "name": name,
        "float": subject.evaluate(model),
        "minmax": trials["minmax"].value,
        "blocks": {block: {"norm_input": asdict(one)} for block, one in ranges.items()},
        "channels": {
            site: [asdict(group) for group in channel_groups(tensors)]
            for site, tensors in values.items()
        },
    }
