"""Runs that are made longer, changed on the disk or held by another process."""

import json
import shutil
import subprocess
import sys

import pytest
from cases import contents, tune
from oracle import quiet

pytestmark = quiet
# ------------------------------------------------------------------ going on

ONE = ["--save-steps", 1, "--learning-rate", 0.01]


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(log["step"], log["alpha"], log["learning_rate"]) for log in map(json.loads, lines)]


def test_a_finished_run_is_made_longer(command, tmp_path):
    assert tune(*command, *ONE).exit_code == 0
    run, before = tmp_path / "run", contents(tmp_path / "run")
    output = tune(*command, *ONE, "--steps", 4, "--resume").output
    assert "going on from checkpoint-2" in output
    assert contents(run) != before
    assert json.loads((run / "config.json").read_text())["settings"]["steps"] == 4
    # of step s: alpha and the rate that the step before it left, and those that it would leave
    # had there been 4 steps from the start
    expected = [(1, 0.25, 0.01), (2, 0.0, 0.005), (3, 0.125, 0.005), (4, 0.0, 0.0025)]
    for found, wanted in zip(losses(run), expected, strict=True):
        assert found == pytest.approx(wanted)
    assert "is finished" in tune(*command, *ONE, "--steps", 4, "--resume").output
    with pytest.raises(ValueError, match=r"settings\.steps was 4, is 2.*--steps may be more"):
        tune(*command, *ONE, "--resume")


def test_a_longer_run_that_is_killed_ends_the_same(command, tmp_path):
    other = [*command[:3], *command[3:]]
    other[other.index(str(tmp_path / "run"))] = str(tmp_path / "other")
    for each in (command, other):
        assert tune(*each, *ONE).exit_code == 0
        assert tune(*each, *ONE, "--steps", 4, "--resume").exit_code == 0
    for name in ("model", "checkpoint-4"):  # what is there when it dies at step 4
        shutil.rmtree(tmp_path / "other" / name)
    assert "going on from checkpoint-3" in tune(*other, *ONE, "--steps", 4, "--resume").output
    assert contents(tmp_path / "other") == contents(tmp_path / "run")


def test_a_model_that_is_not_whole_is_written_again(command, tmp_path):
    assert tune(*command, *ONE).exit_code == 0
    run = tmp_path / "run"
    finished = contents(run)
    for name in finished:
        (run / "model" / name).unlink()
    assert "going on from checkpoint-2" in tune(*command, *ONE, "--resume").output
    assert contents(run) == finished
    (run / "model" / "config.json").write_text("{}")
    tune(*command, *ONE, "--resume")
    assert contents(run) == finished


def flip_a_bit(run):
    file = run / "checkpoint-2" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def spoil(text):
    return lambda run: (run / "checkpoint-2" / "complete.json").write_text(text)


def hide_in_a_file(run):
    shutil.rmtree(run / "checkpoint-2")
    (run / "checkpoint-2").write_text("")


HARMS = {
    "a bit": flip_a_bit,
    "{": spoil("{"),
    "[]": spoil("[]"),
    "nested": spoil("[" * 10**5),
    "no list of files": spoil('{"files": 3}'),
    "no file": spoil('{"files": {}}'),
    "a file": hide_in_a_file,
    "state": lambda run: (run / "checkpoint-2" / "trainer_state.json").write_text("{"),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_checkpoint_that_changed_is_skipped(harm, command, tmp_path):
    assert tune(*command, *ONE).exit_code == 0
    run = tmp_path / "run"
    finished = contents(run)
    shutil.rmtree(run / "model")
    harm(run)
    output = tune(*command, *ONE, "--resume").output
    assert "checkpoint-2 is not complete: skipped and removed" in output
    assert "going on from checkpoint-1" in output
    assert contents(run) == finished


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is damaged: "),
        ("[]", r"config\.json is damaged: no object, but list"),
        ('{"settings": {}}', r"settings\.alpha|settings\.batch_size was None, is 4"),
    ],
)
def test_a_damaged_description_is_named(text, message, command, tmp_path):
    assert tune(*command).exit_code == 0
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        tune(*command, "--resume")


def test_without_metrics_a_finished_run_is_finished(command, tmp_path):
    assert tune(*command).exit_code == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "is finished" in tune(*command, "--resume").output


def test_a_second_process_is_refused(command, tmp_path):
    assert tune(*command).exit_code == 0
    code = f"""
import sys
from pathlib import Path
from quanttune.jobs.publication import held
with held(Path({str(tmp_path / "run")!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"another process is at work in .*run: wait"):
            tune(*command, "--resume")
        other.kill()  # its lock goes with it
    assert "is finished" in tune(*command, "--resume").output
