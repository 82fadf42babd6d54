"""The code of docs/training.md runs, trains, and lets alpha reach 0 at its end."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from oracle import quiet
from pages import PAGES, snippets_of

PAGE = PAGES / "training.md"
START, *SNIPPETS = snippets_of(PAGE)
BEGIN, END = 'dist.init_process_group("gloo")', "dist.destroy_process_group()"
TOGETHER = [snippet for snippet in SNIPPETS if BEGIN in snippet or "fsdp_plugin" in snippet]
ALONE = [snippet for snippet in SNIPPETS if snippet not in TOGETHER]

# what a snippet must have done, in each process
CHECK = """
trained = globals().get("bert", globals().get("student", model))
mine = [p.to_local() if hasattr(p, "to_local") else p for p in trained.parameters()]
assert all(p.isfinite().all() for p in mine)
assert {"trainer", "distiller"} & globals().keys() or tuner.alpha == 0, tuner.alpha
"""


def name(snippet: str) -> str:
    known = ("LightningModule", "QuantTuneTask", "QuantTuneTrainer")
    known += ("Accelerator", "compile", "GradScaler", "parts")
    return next((word for word in known if word in snippet), "plain")


def test_the_page_has_all_snippets():
    assert [len(ALONE), len(TOGETHER)] == [13, 3]


@quiet
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
# Dynamo hides this warning from show, not from a filter that makes it an error
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
# Lightning 2.6: of torch, and of its user
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("snippet", ALONE, ids=name)
def test_a_snippet_for_one_process(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the Trainer makes a folder
    torch.compiler.reset()
    # as inductor takes a minute: test_compile.py has it
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    names: dict[str, object] = {"__name__": "snippet"}
    exec(compile(START, f"{PAGE} start", "exec"), names)
    before = [p.detach().clone() for p in names["model"].parameters()]
    exec(compile(snippet + CHECK, f"{PAGE} {name(snippet)}", "exec"), names)
    if not names.keys() & {"bert", "encoder", "student"}:
        assert not any(map(torch.equal, before, names["model"].parameters()))


def test_the_snippets_for_two_processes(tmp_path):
    """One after the other in one process group: processes take long to start."""
    texts = [START + snippet.replace(BEGIN, "").replace(END, "") + CHECK for snippet in TOGETHER]
    file = tmp_path / "train.py"
    file.write_text("\n".join(["import torch.distributed as dist", BEGIN, *texts, END]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with subprocess.Popen(
        [*command, "--nproc-per-node", "2", str(file)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.terminate()  # and its workers, which a kill would leave behind
            raise
    assert process.returncode == 0, errors
