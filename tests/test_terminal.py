"""What stands on the terminal while a verb runs and after it, and what Ctrl-C does."""

import io
import logging
import os
import signal
import subprocess
import sys
import warnings

import pytest
from rich.console import Console

from quanttune import cli
from quanttune.cli import terminal
from quanttune.cli.tune import stopping


@pytest.fixture
def screen(monkeypatch):
    """Return what is printed, as to a pipe."""
    text = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=text, width=100))
    return text


def test_a_bar_ends_at_its_total(screen):
    with terminal.progress_bar() as bar:
        bar.advance(bar.add_task("all", total=37), 36)
    assert "37/37" in screen.getvalue()


def fail_in_a_bar(done):
    with terminal.showing() as advance:
        if done:
            advance("some", done, 3)
        raise ValueError("it fails")


@pytest.mark.parametrize("done", [0, 2])
def test_an_error_leaves_no_bar(done, screen):
    with pytest.raises(ValueError, match="it fails"):
        fail_in_a_bar(done)
    assert screen.getvalue().strip() == ""


def test_nothing_done_leaves_no_bar(screen):
    with terminal.progress_bar() as bar:
        bar.add_task("loading", total=9)
    assert screen.getvalue().strip() == ""


def test_only_our_warnings_are_said_and_no_logs(screen, monkeypatch, capsys):
    monkeypatch.setattr(sys, "warnoptions", [])
    inside, outside = terminal.__file__, io.__file__
    with terminal.quiet():
        for file, text in ((inside, "pass balance='initial'"), (outside, "of others")):
            warnings.warn_explicit(text, UserWarning, file, 1)
        logging.getLogger("others").warning("of others")
    assert screen.getvalue() == "warning: pass --balance initial\n"
    assert capsys.readouterr().err == ""
    assert logging.root.manager.disable < logging.WARNING


def test_an_interruption_tells_what_may_not_be_whole(monkeypatch, capsys):
    def interrupted():
        terminal.written.append("analysis")
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit):
        cli.main()
    assert "interrupted: analysis may not be whole" in capsys.readouterr().out


def interrupt(steps, times):
    """Press Ctrl-C so often after some steps, and end one more step."""
    with stopping() as stop:
        for _ in range(steps):
            stop()
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        print("still here")
        stop()


@pytest.mark.parametrize(("steps", "times", "waits"), [(1, 1, True), (3, 2, False), (0, 1, False)])
def test_the_first_interruption_waits_for_the_end_of_a_step(steps, times, waits, screen, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt(steps, times)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert ("still here" in capsys.readouterr().out) == waits
    assert ("this step is the last" in screen.getvalue()) == (steps > 0)


def test_other_libraries_print_nothing(command, tmp_path):
    verb = [sys.executable, "-m", "quanttune.cli", "tune", *command, "--trainer", "use_cpu=true"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(verb, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    *_, bar, last = done.stdout.splitlines()
    assert "2/2" in bar
    assert last.startswith("the model is in")
    assert not any(text in done.stdout for text in ("\x1b", "%|", "Map", "Warning", "split"))
