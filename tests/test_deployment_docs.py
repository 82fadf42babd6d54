"""The code of docs/deployment.md runs."""

import re
import sys

import pytest
import torch
from pages import PAGES, snippets_of
from torch._inductor import config

from quanttune.deploy import products

PAGE = PAGES / "deployment.md"
START, EXPORT, *SNIPPETS = snippets_of(PAGE)


def test_the_page_has_all_snippets():
    assert len(SNIPPETS) == 12


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return the names that the first two snippets define, and the folder of their file."""
    torch.manual_seed(0)
    folder, names = tmp_path_factory.mktemp("page"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(START + EXPORT, str(PAGE), "exec"), names)
    return folder, names


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_a_snippet(index, exported, monkeypatch):
    if "export_torchao" in SNIPPETS[index]:
        pytest.importorskip("torchao", "0.18")
    folder, names = exported[0], dict(exported[1])
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)  # which reports the import
    monkeypatch.setattr(torch, "compile", lambda module: module)  # test_torch_export.py compiles
    with config.patch(freezing=False):
        exec(compile(SNIPPETS[index], f"{PAGE} {index}", "exec"), names)
    quantized, images = names["quantized"], names["images"]
    with torch.no_grad():
        expected = quantized(images)
        lost = (names["model"](images) - expected).abs().mean()
    for name in {"logits", "simulated"} & names.keys():
        assert (torch.as_tensor(names[name]) - expected).abs().mean() < lost / 2, name


def test_the_page_lists_every_remark():
    page = PAGE.read_text()
    for remark in products.REMARKS:
        pieces = [piece.strip() for piece in re.split("[:,]", remark)]
        assert any(piece in page for piece in pieces if piece), remark
