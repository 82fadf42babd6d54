"""A run of `quanttune tune` on a tiny model, as the attacks kill it."""

import hashlib

from cases import bert_case, write_csv

from quanttune.jobs import tune
from quanttune.jobs.settings import Settings


def prepared(folder):
    """Write a model and its data, and return what a run is told."""
    bert_case(folder)
    write_csv(folder / "rows.csv", ("text", "label"), [(f"w{i} w1", i % 5) for i in range(8)])
    return {"model": str(folder / "model"), "data": str(folder / "rows.csv")}


def tuned(arguments, out):
    settings = Settings(**arguments, steps=4, batch_size=4, save_steps=1)
    tune.tune(settings, out, resume=True, say=lambda _: None)


def finished(run):
    """Return the digests of a run's model, and its metrics."""
    files = sorted((run / "model").iterdir())
    return [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files], (
        run / "metrics.jsonl"
    ).read_text()
