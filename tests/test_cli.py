"""The command line as a user types it."""

import json
import subprocess
import sys

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner

from quanttune import cli
from quanttune.cli import demo
from quanttune.cli.options import grouped
from quanttune.demo.experiment import Results, Row
from quanttune.demo.minilm import MiniLM
from quanttune.files import check_writable
from quanttune.quantization.methods import METHODS

runner = CliRunner()


def test_demo_writes_its_files_and_prints_the_table(short_digits, tmp_path):
    arguments = ["demo", "--task", "digits", "--out", str(tmp_path / "out")]
    result = runner.invoke(cli.app, [*arguments, "--json", str(tmp_path / "sub" / "a.json")])
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["ranges.png", "report.html", "results.json"]
    copied = json.loads((tmp_path / "sub" / "a.json").read_text())
    assert copied == json.loads((tmp_path / "out" / "results.json").read_text())
    for text in ("accuracy on the test rows", "W8A8", "detached", "Synthetic"):
        assert text in result.output


def test_the_demo_s_table_fits_into_80_columns(monkeypatch):
    arms = [arm.name for arm in MiniLM.arms]
    ways = [(32, "none", "channel"), (8, "torch-dynamic", "channel"), (8, "minmax", "tensor")]
    rows = [Row(0, arm, *way, "cosine", 0.5) for arm in arms for way in ways]
    monkeypatch.setattr(demo, "console", console := Console(record=True, width=80))
    demo._print_results(Results("minilm", "cosine", [], {}, {}, rows=rows))
    lines = console.export_text().splitlines()
    assert next(line.split() for line in lines if "control" in line) == arms
    numbers = ["0.500"] * len(arms)
    assert ["fp32", *numbers] in [line.split() for line in lines]
    assert ["W8A8", "torch-dynamic", *numbers] in [line.split() for line in lines]
    assert ["W8A8", "minmax", "/tensor", *numbers] in [line.split() for line in lines]


def test_dry_run_writes_nothing(tmp_path):
    out = tmp_path / "out"
    result = runner.invoke(cli.app, ["demo", "--dry-run", "--out", str(out)])
    assert result.exit_code == 0
    assert "base, control, qat8, qat6, paper, detached, refit, recipe" in result.output
    assert not out.exists()


def test_doctor_names_backends_and_versions(tmp_path):
    path = tmp_path / "doctor.json"
    result = runner.invoke(cli.app, ["doctor", "--json", str(path)])
    assert result.exit_code == 0
    assert "C++: the extension is built" in result.output
    assert json.loads(path.read_text())["versions"]["torch"]


def test_every_verb_has_help_with_an_example():
    for command in cli.app.registered_commands:
        name = command.name
        result = runner.invoke(cli.app, [name, "--help"])
        assert f"Example: quanttune {name}" in result.output


def test_the_help_of_calibrate_names_every_method():
    output = runner.invoke(cli.app, ["calibrate", "--help"], env={"COLUMNS": "800"}).output
    assert f"{', '.join(METHODS)}. Repeat for several." in output


def test_a_verb_gets_what_functions_make_of_their_options():
    def area(width: int, height: int = 2):
        return width * height

    made = []

    @grouped(size=area)
    def run(size: int, name: str, height: int = 3, loud: bool = False):
        """Paint."""
        made.append((size, name, height, loud))

    app = typer.Typer(add_completion=False)
    app.command()(run)
    names = [option.name for option in typer.main.get_command(app).params]
    assert names == ["width", "name", "height", "loud"]
    runner.invoke(app, ["5", "a wall"])
    runner.invoke(app, ["5", "a wall", "--height", "7", "--loud"])
    assert made == [(15, "a wall", 3, False), (35, "a wall", 7, True)]


def test_a_wrong_task_is_one_line_and_status_two():
    command = [sys.executable, "-m", "quanttune.cli", "demo", "--task", "imagenet"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert (
        "error: task must be one of minilm, digits, smollm2, whisper, got 'imagenet'"
        in result.stdout
    )
    assert "Traceback" not in result.stdout + result.stderr


def test_interruption_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 130
    assert "interrupted: nothing was written" in capsys.readouterr().out


@pytest.mark.parametrize("write", [save_file, torch.save])
def test_a_full_disk_is_one_line(write, tmp_path, monkeypatch, capsys):
    resource = pytest.importorskip("resource")  # not on Windows
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(cli, "app", lambda: write({"a": torch.ones(10_000)}, tmp_path / "file"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exit_info.value.code == 2
    assert "error: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "m", "--out", "{file}/m.onnx"],
        ["analyze", "--out", "{file}/a/b"],
        ["demo", "--out", "{file}/d"],
        ["report", "r.json", "--out", "{file}/r.html"],
        ["evaluate", "m", "--data", "d", "--json", "{file}/n.json"],
    ],
)
def test_where_nothing_can_be_written_is_told_before_the_work(arguments, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    result = runner.invoke(cli.app, [text.format(file=file) for text in arguments])
    assert str(result.exception).startswith(f"{file}")
    assert "cannot be written ([Errno 20] Not a directory" in str(result.exception)


@pytest.mark.parametrize("name", ["a", "a/b/c", ""])
def test_a_check_of_a_folder_leaves_nothing(name, tmp_path):
    check_writable(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_quanttune_is_a_traceback(monkeypatch):
    def wrong():
        raise RuntimeError("of us")

    monkeypatch.setattr(cli, "app", wrong)
    with pytest.raises(RuntimeError, match="of us"):
        cli.main()
