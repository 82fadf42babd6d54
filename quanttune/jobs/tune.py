"""Tune a model on a dataset, in a folder that it can go on from. What `quanttune tune` does."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PrinterCallback, TrainingArguments, set_seed

from ..refitting.refit import refit
from ..trainer import QuantTuneTrainer
from ..trainer.checkpoint import load_weights
from ..tuning.attach import attach
from . import checkpoints, models
from .dataset import Dataset, load_dataset
from .publication import held
from .recorder import Recorder
from .run_folder import RunFolder
from .settings import Settings
from .training_arguments import training_arguments

_LAUNCH = (
    "start a process for each by `accelerate launch -m quanttune.cli tune ...`, or set "
    "CUDA_VISIBLE_DEVICES=0"
)


@dataclass(frozen=True)
class _Job:
    """A model, its data and how it is trained."""

    model: nn.Module
    inputs: Dataset
    arguments: TrainingArguments


def tune(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    inputs: Dataset | None = None,
    change: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> dict[str, Any]:
    """Tune a model and write all of the run to the folder `out`; return what came of it.

    The folder gets config.json, environment.json, metrics.jsonl (a line per logged step),
    checkpoint-N and, at the end, the float32 model in model/. Augmentation there is none. With
    `resume` a run that was killed goes on from its newest whole checkpoint, and on a CPU ends with
    the weights and the metrics that it would have ended with, bit for bit; a run that was not begun
    is begun, one that is finished is left alone. With more `settings.steps` than before either goes
    on to so many; the learning rate and alpha are from there on what they would have been had there
    been so many from the start. One process at a time works in a folder, or those of one launcher
    (torchrun, accelerate), the first of which writes, and calls `say` and `progress`.

    Args:
        dry_run: load and check everything, and stop before anything is written to `out`.
        progress: called with the step and its loss.
        inputs: the rows, if they are read already; `settings` then only names them.
        change: what is done to the model before it is tuned, such as `clip_softmax`.

    Raises:
        ValueError: an argument, the data or the folder does not fit; it says what would.
    """
    arguments = training_arguments(settings, out)
    if arguments.n_gpu > 1:
        raise ValueError(f"{arguments.n_gpu} GPUs are visible to one process: {_LAUNCH}")
    is_first = arguments.process_index == 0
    folder = RunFolder(out)
    folder.check({"settings": settings.as_json()}, resume)
    with held(out) if is_first and not dry_run else nullcontext():
        if folder.is_finished(settings.steps):
            say(f"{out} is finished: nothing is left to do")
            return _outcome(folder, settings)
        job = _prepare(settings, arguments, inputs, change)
        config = {"settings": settings.as_json(), **job.inputs.facts}
        if arguments.world_size > 1:
            config["processes"] = arguments.world_size
        found: list[Any] = [None]
        if is_first:
            folder.check(config, resume)
            for line in job.inputs.said:
                say(line)
            if not dry_run:
                written = json.loads(arguments.to_json_string())
                found = [_begin(folder, {**config, "training_arguments": written}, say)]
        if dry_run:
            return config
        (checkpoint,) = broadcast_object_list(found)
        model, state = _train(settings, job, folder, checkpoint, progress)
        if is_first:
            folder.publish(model, job.inputs.processor, settings.steps, state)
        PartialState().wait_for_everyone()
        return _outcome(folder, settings, checkpoint)


def _begin(folder: RunFolder, config: dict[str, Any], say: Callable[[str], None]) -> Path | None:
    """Write down what is tuned, and return the checkpoint from which it goes on."""
    if not folder.is_begun:
        folder.begin(config)
        return None
    checkpoint, said = folder.resume(config)
    for line in said:
        say(line)
    say(f"going on from {checkpoint.name if checkpoint else 'the start'}")
    return checkpoint


def _prepare(
    settings: Settings,
    arguments: TrainingArguments,
    inputs: Dataset | None,
    change: Callable[[nn.Module], nn.Module],
) -> _Job:
    with arguments.main_process_first():  # the others find what it made in the cache
        inputs = inputs or load_dataset(settings, new_head=True)
    set_seed(settings.seed)  # a new head is drawn
    model, drawn = models.load_model(inputs.name, inputs.config, inputs.task)
    model = change(model)
    name = type(model).__name__
    if drawn:
        more = f" and {len(drawn) - 4} more" if len(drawn) > 4 else ""
        inputs.said.append(f"drawn at random: {', '.join(drawn[:4])}{more}")
    if settings.lora_rank:
        from .adapters import add_adapters

        model = add_adapters(model, settings.lora_rank, drawn)
    attach(model, total_steps=settings.steps, **settings.tuning).detach()  # its checks, before all
    batch = settings.batch_size * arguments.world_size
    epochs = settings.steps * batch * arguments.gradient_accumulation_steps
    inputs.said.append(
        f"{inputs.task}: {name} on {len(inputs.rows)} rows, {settings.steps} "
        f"steps of {batch}, {epochs / len(inputs.rows):.1f} epochs"
    )
    return _Job(model, inputs, arguments)


def _train(
    settings: Settings,
    job: _Job,
    folder: RunFolder,
    checkpoint: Path | None,
    progress: Callable[[int, float], None],
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Return the trained model; and its weights, if this process has a share of them only."""
    if checkpoint and checkpoints.step_of(checkpoint) == settings.steps:
        # the Trainer would take one step more in the middle of an epoch
        _load(settings, job.model, checkpoint)
        return _merged(settings, job.model), None
    if settings.refit_rows and not checkpoint:
        refit(job.model, job.inputs.batches(settings, job.model, settings.refit_rows))
    trainer = QuantTuneTrainer(
        model=job.model,
        args=job.arguments,
        train_dataset=job.inputs.rows,
        data_collator=job.inputs.collate,
        callbacks=[Recorder(folder, progress)],
        tuning=settings.tuning,
    )
    if settings.lora_rank and trainer.is_fsdp_enabled:
        raise ValueError(
            "--lora-rank and FSDP do not go together: adapters are merged into whole weights. "
            "Launch without FSDP, so that each process has all of the model"
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not trainer.is_fsdp_enabled:
        return _merged(settings, job.model), None
    return job.model, trainer.accelerator.get_state_dict(trainer.model_wrapped)


def _merged(settings: Settings, model: nn.Module) -> nn.Module:
    if not settings.lora_rank:
        return model
    from .adapters import merged

    return merged(model)


def _load(settings: Settings, model: Any, checkpoint: Path) -> None:
    if settings.lora_rank:
        from .adapters import load_adapters

        load_adapters(model, checkpoint)
        model = model.get_base_model()
    else:
        load_weights(model, checkpoint)
    model.config = models.load_config(str(checkpoint))  # the Trainer changes it, too


def _outcome(
    folder: RunFolder, settings: Settings, checkpoint: Path | None = None
) -> dict[str, Any]:
    return {
        "run": str(folder.path),
        "model": str(folder.model),
        "steps": settings.steps,
        "resumed_from": checkpoints.step_of(checkpoint) if checkpoint else None,
        "last": folder.last(),
    }
