"""Imports of the package run one way, between files and between folders; tests have its names."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.util import resolve_name

import pytest
from packages import ROOT

FLOORS = 10


def module_of(path):
    """Return a file's name as its importers write it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in (ROOT / "quanttune").rglob("*.py")}
del FILES["quanttune"]  # what the package offers: it imports from everywhere


def imported(path):
    """Return the files that a file imports, wherever in it and for whatever purpose."""
    package = module_of(path.with_name("__init__.py"))
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names & set(FILES) or {base}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(FILES) - {module_of(path)}


def rooms_of(files):
    """Return the same between folders; a file beside them stands for itself."""
    found = {}
    for name, targets in files.items():
        room, *others = (n.split(".")[1] for n in (name, *targets))
        found.setdefault(room, set()).update({*others} - {room})
    return found


def floors_of(graph):
    """Return on which floor each room is: above all that it imports from."""
    floors = {}
    for name in TopologicalSorter(graph).static_order():
        floors[name] = 1 + max((floors[other] for other in graph[name]), default=0)
    return floors


@pytest.fixture(scope="module")
def files():
    graph = {name: imported(path) for name, path in FILES.items()}
    assert "quanttune.reference" in graph["quanttune.ops"]
    assert "quanttune.quantization.convert" in graph["quanttune.quantization.simulation"]
    return graph


def test_no_file_imports_itself_by_way_of_others(files):
    TopologicalSorter(files).prepare()  # its error names the files


def test_no_folder_imports_one_that_imports_it(files):
    assert max(floors_of(rooms_of(files)).values()) <= FLOORS


def test_circles_are_seen_in_functions_too(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "quanttune").mkdir()
    (tmp_path / "quanttune" / "late.py").write_text("def f():\n    from .ops import share\n")
    graph = {"quanttune.late": imported(tmp_path / "quanttune" / "late.py")}
    assert graph["quanttune.late"] == {"quanttune.ops"}
    with pytest.raises(CycleError):
        TopologicalSorter({**graph, "quanttune.ops": {"quanttune.late"}}).prepare()


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("quanttune.analysis.report", "quanttune.report.report", "write_report"),
        ("quanttune.inference.products", "quanttune.deploy.products", "explain"),
        ("quanttune.quantization.insertion", "quanttune.quantization.state", "quantizers"),
    ],
)
def test_names_that_were_documented_work_with_a_warning(old, new, name):
    with pytest.warns(DeprecationWarning, match=f"{old} is {new} now"):
        found = getattr(import_module(old), name)
    assert found is getattr(import_module(new), name)
    with pytest.raises(AttributeError):
        _ = import_module(old).no_such_name


def test_test_files_are_named_after_what_they_test():
    """A source file, a folder, a verb, or a topic that tests/README.md explains."""
    sources = [*(ROOT / "quanttune").rglob("*"), *(ROOT / "triton_kernels").rglob("*")]
    verbs = {f"{path.stem}_command" for path in (ROOT / "quanttune" / "cli").glob("*.py")}
    topics = set(re.findall(r"\w+", (ROOT / "tests" / "README.md").read_text()))
    names = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert names - {path.stem for path in sources} - verbs - topics == set()


def too_long(path, lines=300, of_function=60):
    """Return what of a file is longer than that, docstrings of functions apart.

    A function whose docstring says why it is one function may be.
    """
    text = path.read_text()
    found = [path.name] if text.count("\n") > lines else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            said = ast.get_docstring(node) or ""
            documented = node.body[0].end_lineno - node.body[0].lineno + 1 if said else 0
            length = node.end_lineno - node.lineno + 1 - documented
            if length > of_function and "One function, since" not in said:
                found.append(node.name)
    return found


def test_files_and_functions_are_short():
    folders = (ROOT / name for name in ("quanttune", "triton_kernels", "benchmarks"))
    found = {str(path): too_long(path) for folder in folders for path in folder.rglob("*.py")}
    assert len(found) > 200
    assert {path: names for path, names in found.items() if names} == {}


def test_what_is_too_long_is_seen(tmp_path):
    path = tmp_path / "long.py"
    body = "    x = 1\n" * 60
    doc = '    """Do it.\n\n    {}\n    """\n'
    path.write_text(f"def run():\n{doc.format('Much is said.')}{body}")
    assert too_long(path) == ["run"]
    path.write_text(f"def run():\n{doc.format('One function, since it is.')}{body}")
    assert too_long(path) == []
    path.write_text(f"def run():\n{doc.format('Much is said.')}{body[:-10]}" + "\n" * 250)
    assert too_long(path) == ["long.py"]
