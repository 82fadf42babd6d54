"""Sections of an analysis on its outliers: where they are, and which are massive."""

from collections.abc import Sequence

from .page import Section, Table, Text
from .plots import short_site
from .words import NAMES, Data, percent

_SHOWN = 20


def outliers(worst: Sequence[Data]) -> Section:
    """Return where the largest values of the tensors that hurt most are."""
    columns = (
        Text("tensor"), "alone", "max |x|", "channel", "token", Text("largest at"), "median |x|",
        "outlier ratio", "kurtosis",
    )  # fmt: skip
    groups = [
        (NAMES[kind], [_outlier_row(site) for site in worst if site["kind"] == kind])
        for kind in dict.fromkeys(site["kind"] for site in worst)
    ]
    return Section(
        "Where the outliers are",
        "The channel and the token at which most samples have their largest magnitude, and how "
        "many of them do. The outlier ratio is (max - median) / deviation per sample: what tuning "
        "lowers. The kurtosis of a Gaussian is 3.",
        tables=[Table(columns, groups)],
    )


def _outlier_row(site: Data) -> Sequence[str]:
    found = site["outliers"]
    where: Sequence[str] = ("-", "-", "")
    if found:
        texts = [peak["text"] or f"sample {peak['sample']}" for peak in found["largest"]]
        where = (
            f"{found['channel']} ({percent(found['channel_share'])})",
            f"{found['token']} ({percent(found['token_share'])})",
            Text(", ".join(dict.fromkeys(texts))),
        )
    return [
        Text(short_site(site["site"])),
        percent(site["sensitivity"]),
        f"{site['absmax']:.4g}",
        *where,
        f"{site['median']:.2g}",
        f"{site['ratio']:.1f}",
        f"{site['kurtosis']:.1f}" if "kurtosis" in site else "-",
    ]


def massive(data: Data) -> Section:
    """Return which tokens hold massive activations, and which are attention sinks."""
    held = [site for site in data["sites"] if site.get("massive")]
    held.sort(key=lambda site: -site["massive"]["range_share"])
    values = Table(
        (
            Text("tensor"), "largest", "median |x|", "channel", "token", Text("text"), "tokens",
            "all others reach", "share of the range",
        ),
        [(None, [_massive_row(site) for site in held[:_SHOWN]])],
    )  # fmt: skip
    sinks = Table(
        (Text("tensor"), "token", Text("text"), "attention", "without preference"),
        [(None, [_sink_row(sink) for sink in data.get("sinks", ())])],
    )
    return Section(
        "Massive activations and attention sinks",
        "Tokens that hold a value of a hundred medians and more, and ten times what is usual of a "
        "token: which channel and token hold most of them, how many tokens do, and the share of "
        "the range that is for them alone. Sinks are tokens that get 30 % of the attention or "
        "more. Where the range is for a first token or for a few others, a causal language model "
        "is cured by a kept prefix (quanttune.prefix), which costs nothing in integers.",
        tables=[table for table in (values, sinks) if table.groups[0][1]],
        points=[] if held or data.get("sinks") else ["There are none."],
    )


def _massive_row(site: Data) -> Sequence[str]:
    found = site["massive"]
    return [
        Text(short_site(site["site"])),
        f"{found['size']:.4g}",
        f"{found['median']:.2g}",
        f"{found['channel']} ({percent(found['channel_share'])})",
        f"{found['token']} ({percent(found['token_share'])})",
        Text(_token_text(found)),
        percent(found["tokens"]),
        f"{found['below']:.4g}",
        percent(found["range_share"]),
    ]


def _sink_row(found: Data) -> Sequence[str]:
    return [
        Text(short_site(found["site"])),
        f"{found['token']} ({percent(found['token_share'])})",
        Text(_token_text(found)),
        percent(found["attention"]),
        percent(found["uniform"]),
    ]


def _token_text(found: Data) -> str:
    if found["id"] is None:
        return ""
    return f"{found['text'] or found['id']} ({percent(found['id_share'])})"
