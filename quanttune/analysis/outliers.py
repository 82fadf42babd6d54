"""Where the outliers of a site are: which channel, which token, and what that token says."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .survey import Peak, SiteSurvey, rows_of

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
    row = peak.sample
    for batch in data:
        if row < rows_of(batch):
            ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
            if tokenizer is None or ids is None or peak.token >= ids.shape[1]:
                return None
            return str(tokenizer.convert_ids_to_tokens(int(ids[row, peak.token])))
        row -= rows_of(batch)
    raise ValueError(f"sample {peak.sample} is not in the data")
