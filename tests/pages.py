"""The code in the pages of docs."""

import re
from pathlib import Path

PAGES = Path(__file__).resolve().parent.parent / "docs"


def snippets_of(page: Path) -> list[str]:
    """Return the pieces of Python of a page; what the first defines, the others use."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
