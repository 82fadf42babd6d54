"""The folder of a run: config.json, environment.json, metrics.jsonl, checkpoints and the model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..environment import environment
from ..files import sync, write_json, write_text
from . import checkpoints
from .checkpoints import read_object
from .publication import LOCK, remove, write

CONFIG, ENVIRONMENT, METRICS, MODEL = "config.json", "environment.json", "metrics.jsonl", "model"
STATE = "trainer_state.json"


class RunFolder:
    """What is on the disk of a run, so that a kill at any time leaves something to go on from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG
        self.metrics = path / METRICS
        self.model = path / MODEL

    @property
    def is_begun(self) -> bool:
        return self.config.exists()

    def is_finished(self, steps: int) -> bool:
        """Tell whether the model is there, whole, and of so many steps."""
        return checkpoints.is_complete(self.model, steps=steps)

    def check(self, config: dict[str, Any], resume: bool) -> None:
        """Refuse a folder that holds something else, or a run that `config` does not describe.

        What `config` leaves out is not compared. There may be more steps than before.
        """
        before = read_object(self.config) if self.is_begun else {}
        if not isinstance(before.get("settings"), dict):
            if strangers := self._strangers():
                raise ValueError(
                    f"{self.path} is not empty and holds no run ({', '.join(strangers[:3])}): "
                    "choose another --out"
                )
            return
        if not resume:
            raise ValueError(
                f"{self.path} holds a run: go on with it by --resume, or choose another --out"
            )
        old, new = before["settings"].get("steps"), config["settings"]["steps"]
        if isinstance(old, int) and old < new:
            before["settings"]["steps"] = new
        changed = list(_differences({key: before.get(key) for key in config}, config))
        if changed:
            more = " (--steps may be more)" if isinstance(new, int) else ""
            raise ValueError(
                f"{self.path} was begun otherwise: {'; '.join(changed)}. Resume with the same "
                f"arguments{more}, or choose another --out"
            )

    def begin(self, config: dict[str, Any]) -> None:
        """Write down what is tuned and where; config.json comes last."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._sweep()
        write_json(self.path / ENVIRONMENT, environment())
        write_text(self.metrics, "")
        write_json(self.config, config)

    def resume(self, config: dict[str, Any]) -> tuple[Path | None, list[str]]:
        """Return the newest whole checkpoint, if there is one, and what else there is to say.

        Checkpoints that are not whole are removed, and metrics.jsonl is what it was then.
        config.json is another one if there are more steps now.
        """
        self._sweep()
        if read_object(self.config) != config:
            write_json(self.config, config)
        whole, broken = checkpoints.find(self.path)
        said = [f"{path.name} is not complete: skipped and removed" for path in broken]
        for path in broken:
            remove(path)
        before, now = self.path / ENVIRONMENT, environment()
        then = read_object(before) if before.exists() else {}
        said += [f"the last bits may differ: {d}" for d in _differences(then, now)]
        checkpoint = whole[-1] if whole else None
        history = read_object(checkpoint / STATE)["log_history"] if checkpoint else []
        write_text(self.metrics, "".join(map(_line, history)))
        return checkpoint, said

    def append(self, log: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(_line(log))

    def publish(
        self, model: Any, processor: Any, steps: int, state: dict[str, Any] | None = None
    ) -> None:
        """Save the final model in the place of one of fewer steps, if there is one.

        state: its weights, if the model holds a share of them only.
        """
        partial = write(model, processor, self.model, state)
        checkpoints.mark(partial, steps=steps)
        if self.model.exists():
            self.model.rename(self.path / f".{MODEL}.old")
        partial.rename(self.model)
        sync(self.path)
        self._sweep()

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; one that was being written goes, also in the file."""
        *lines, torn = self.metrics.read_text(encoding="utf-8").split("\n")
        if torn:
            write_text(self.metrics, "".join(f"{line}\n" for line in lines))
        return [json.loads(line) for line in lines]

    def last(self) -> dict[str, Any]:
        """Return the newest line of metrics.jsonl, empty if there is none."""
        if not self.metrics.exists():
            return {}
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        try:
            last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        except ValueError as error:
            raise ValueError(f"{self.metrics} is damaged: {error}") from error
        return last

    def _strangers(self) -> list[str]:
        """Return what is in the folder and not from the start of a run that was killed."""
        if not self.path.exists():
            return []
        own = {ENVIRONMENT, METRICS, LOCK, *(path.name for path in self._partials())}
        return sorted(path.name for path in self.path.iterdir() if path.name not in own)

    def _sweep(self) -> None:
        """Remove what a killed process was writing."""
        for path in self._partials():
            remove(path)

    def _partials(self) -> list[Path]:
        patterns = f".{CONFIG}.*", f".{ENVIRONMENT}.*", f".{METRICS}.*", f".{MODEL}*"
        return [path for pattern in patterns for path in self.path.glob(pattern)]


def _line(log: dict[str, Any]) -> str:
    return json.dumps(log, sort_keys=True) + "\n"  # the order in which a checkpoint has them


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old!r}, is {new!r}"
