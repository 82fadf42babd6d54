"""The folder of a run: config.json, environment.json, metrics.jsonl, checkpoints and the model."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..analysis.environment import environment
from ..files import sync, write_json, write_text
from . import checkpoints

CONFIG, ENVIRONMENT, METRICS, MODEL = "config.json", "environment.json", "metrics.jsonl", "model"


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

    @property
    def is_finished(self) -> bool:
        return self.model.exists()

    def check(self, config: dict[str, Any], resume: bool) -> None:
        """Refuse a folder that holds something else, or a run that `config` does not describe.

        What `config` leaves out is not compared.
        """
        before = self._read(self.config) if self.is_begun else {}
        if "settings" not in before:
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
        changed = list(_differences({key: before[key] for key in config}, config))
        if changed:
            raise ValueError(
                f"{self.path} was begun otherwise: {'; '.join(changed)}. Resume with the same "
                "arguments, or choose another --out"
            )

    def begin(self, config: dict[str, Any]) -> None:
        """Write down what is tuned and where; config.json comes last."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._sweep()
        write_json(self.path / ENVIRONMENT, environment())
        write_text(self.metrics, "")
        write_json(self.config, config)

    def resume(self) -> tuple[Path | None, list[str]]:
        """Return the newest whole checkpoint, if there is one, and what else there is to say.

        Checkpoints that are not whole are removed, and metrics.jsonl is what it was then.
        """
        self._sweep()
        whole, broken = checkpoints.find(self.path)
        said = [f"{path.name} is not complete: skipped and removed" for path in broken]
        for path in broken:
            shutil.rmtree(path)
        before = self._read(self.path / ENVIRONMENT)
        said += [f"the last bits may differ: {d}" for d in _differences(before, environment())]
        checkpoint = whole[-1] if whole else None
        history = self._read(checkpoint / "trainer_state.json")["log_history"] if checkpoint else []
        write_text(self.metrics, "".join(map(_line, history)))
        return checkpoint, said

    def append(self, log: dict[str, Any]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(_line(log))

    def publish(self, model: Any, processor: Any) -> None:
        """Save the final model."""
        publish(model, processor, self.model)

    def _strangers(self) -> list[str]:
        """Return what is in the folder and not from the start of a run that was killed."""
        if not self.path.exists():
            return []
        own = {ENVIRONMENT, METRICS, *(path.name for path in self._partials())}
        return sorted(path.name for path in self.path.iterdir() if path.name not in own)

    def _sweep(self) -> None:
        """Remove what a killed process was writing."""
        for path in self._partials():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _partials(self) -> list[Path]:
        patterns = f".{CONFIG}.*", f".{ENVIRONMENT}.*", f".{METRICS}.*", f".{MODEL}"
        return [path for pattern in patterns for path in self.path.glob(pattern)]

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return data


def publish(model: Any, processor: Any, folder: Path) -> None:
    """Save a model with what makes its inputs, under the folder's name only when it is whole."""
    partial = folder.with_name(f".{folder.name}")
    if partial.exists():  # from a process that was killed
        shutil.rmtree(partial)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    for path in partial.rglob("*"):
        sync(path)
    partial.rename(folder)
    sync(folder.parent)


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds something."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another --out")


def _line(log: dict[str, Any]) -> str:
    return json.dumps(log, sort_keys=True) + "\n"  # the order in which a checkpoint has them


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old!r}, is {new!r}"
