"""Real English without a download: the docstrings of installed packages, split by module."""

import ast
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

PACKAGES = (
    "numpy", "scipy", "sklearn", "matplotlib", "networkx", "sympy", "transformers", "torch",
)  # fmt: skip
FILES = 120  # per package: parsing all of them would take longer than tuning


@dataclass(frozen=True)
class Splits:
    """Token ids, (rows, tokens) each. No module, and no text, is in two of them."""

    tuning: Tensor
    validation: Tensor
    test: Tensor


def load(tokenizer: Any, tokens: int, validation: int = 256, test: int = 512) -> Splits:
    """Tokenize docstrings to rows of exactly `tokens` tokens: shorter ones are left out, so none is
    padded.
    """
    texts: dict[str, list[str]] = {"tuning": [], "validation": [], "test": []}
    seen: set[str] = set()
    with _no_garbage_collection():
        for split, text in _docstrings():
            if text[:60] not in seen:
                seen.add(text[:60])
                texts[split].append(text)
    rows = {split: _tokenize(tokenizer, part, tokens) for split, part in texts.items()}
    for split, wanted in (("tuning", 1), ("validation", validation), ("test", test)):
        if len(rows[split]) < wanted:
            raise ValueError(
                f"the docstrings make {len(rows[split])} {split} rows, {wanted} are needed"
            )
    return Splits(rows["tuning"], rows["validation"][:validation], rows["test"][:test])


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield (split, docstring) in an order that depends on nothing but the packages."""
    found: list[tuple[int, str, str]] = []
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        root = Path(spec.submodule_search_locations[0])
        files = sorted(root.rglob("*.py"), key=lambda path: _hash(path.relative_to(root.parent)))
        for path in files[:FILES]:
            split = _split_of(path.relative_to(root.parent))
            found += [(crc32(text.encode()), split, text) for text in _texts(path)]
    for _, split, text in sorted(found):
        yield split, text


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees hold no cycles, and looking for some takes longer than all the parsing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _texts(path: Path) -> Iterator[str]:
    for node in _statements(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 90:
                yield text


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without its expressions: most nodes are those, and no docstring is in them."""
    for block in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield child
            yield from _statements(child)


def _hash(path: Path) -> int:
    return crc32(path.as_posix().encode())


def _split_of(path: Path) -> str:
    part = _hash(path) % 7
    return "test" if part >= 5 else "validation" if part == 4 else "tuning"


def _tokenize(tokenizer: Any, texts: list[str], tokens: int) -> Tensor:
    encoded = tokenizer(texts, truncation=True, max_length=tokens)["input_ids"]
    return torch.tensor([ids for ids in encoded if len(ids) == tokens])
