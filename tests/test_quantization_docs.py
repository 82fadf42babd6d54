"""The code of docs/quantization.md runs."""

import pytest
from pages import PAGES, snippets_of
from torch import nn

PAGE = PAGES / "quantization.md"
START, *SNIPPETS = snippets_of(PAGE)


def test_the_page_has_all_snippets():
    assert len(SNIPPETS) == 15


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_a_snippet(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(START + SNIPPETS[index], f"{PAGE} {index}", "exec"), names)
    models = [m for name, m in names.items() if isinstance(m, nn.Module) and name != "llama"]
    assert all(model(names["images"]).isfinite().all() for model in models)
    assert "page" not in names or names["page"].is_file()
