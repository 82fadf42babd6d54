"""The code of docs/prefix.md runs."""

from oracle import quiet
from pages import PAGES, snippets_of

PAGE = PAGES / "prefix.md"
pytestmark = quiet


def test_the_page():
    start, snippet = snippets_of(PAGE)
    names: dict[str, object] = {}
    exec(compile(start + snippet, str(PAGE), "exec"), names)
    assert names["tokens"].shape == (8, 20)
