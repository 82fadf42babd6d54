"""The code of docs/auto.md runs."""

from oracle import quiet
from pages import PAGES, snippets_of

PAGE = PAGES / "auto.md"
pytestmark = quiet


def test_the_page():
    start, snippet = snippets_of(PAGE)
    names: dict[str, object] = {}
    exec(compile(start + snippet, str(PAGE), "exec"), names)
    assert names["chosen"].met
