"""Runs `quanttune tune` in processes of their own, some of which die on the way.

Usage: python tune_processes.py PLAN, a JSON file with a list of [arguments, death, log]. Each is a
fork, so that the imports are paid for once. A death is a [place, step] at which the process sends
itself a signal; null is none. Prints the list of exit codes, -9 for SIGKILL.
"""

import io
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # what attach imports
import transformers
import transformers.trainer

from quanttune import cli
from quanttune.jobs import tune  # noqa: F401


def die(sign=signal.SIGKILL):
    os.kill(os.getpid(), sign)


def after_step(step, sign=signal.SIGKILL):
    class Death(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == step:
                die(sign)

    transformers.trainer.DEFAULT_CALLBACKS.append(Death)


def before(module, name, condition):
    """Die instead of a call, if a condition on its arguments holds."""
    function = getattr(module, name)

    def deadly(*args, **kwargs):
        if condition(*args):
            die()
        return function(*args, **kwargs)

    setattr(module, name, deadly)


def while_writing(step):
    """Die when half of the optimizer's state is on the disk."""
    save = torch.save

    def deadly(data, path, *args):
        if str(path).endswith(f"checkpoint-{step}/optimizer.pt"):
            whole = io.BytesIO()
            save(data, whole)
            Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])
            die()
        save(data, path, *args)

    torch.save = deadly


DEATHS = {
    "step": after_step,
    "interrupt": lambda step: after_step(step, signal.SIGINT),
    "writing": while_writing,
    "begin": lambda _: before(Path, "replace", lambda _, path: path.name == "config.json"),
    "mark": lambda step: before(
        Path, "replace", lambda _, path: str(path).endswith(f"checkpoint-{step}/complete.json")
    ),
    "publish": lambda _: before(  # the weights are there already
        transformers.PreTrainedTokenizerBase,
        "save_pretrained",
        lambda _, path, *rest: "checkpoint" not in str(path),
    ),
}


def run(arguments, death, log):
    """Run the command line in a fork and return its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # a parent may ignore it, as the workers of pytest-xdist do
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if death:
        place, step = death
        DEATHS[place](step)
    torch.seed()  # another in every process, so that --seed has to do it
    sys.argv = ["quanttune", *arguments]
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([run(*entry) for entry in plan]))
