"""What users install: the source distribution, the wheel made from it, both away from here."""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cases import bert_case
from packages import (
    NO_COMPILER,
    OFFLINE,
    QUICK,
    ROOT,
    build,
    command,
    environment,
    files_of_the_checkout,
    install,
    is_generated,
    unpack,
)

for module in ("setuptools", "pybind11", "ninja", "auditwheel", "pip"):
    pytest.importorskip(module, reason="building a wheel takes it")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The unpacked source distribution. Built in a copy: a build reads what earlier ones left."""
    folder = tmp_path_factory.mktemp("source")
    for name in files_of_the_checkout():
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "checkout" / name)
    (folder / "out").mkdir()
    archive, _ = build("sdist", folder / "checkout", folder / "out")
    return unpack(archive, folder / "unpacked")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """The wheel of `make wheel`: built from the source distribution, then named by auditwheel."""
    folder = tmp_path_factory.mktemp("wheel")
    plain, _ = build("wheel", source, folder, **QUICK)
    command(
        sys.executable,
        "-m",
        "auditwheel",
        "repair",
        "-w",
        folder / "repaired",
        plain,
        folder=folder,
    )
    (repaired,) = (folder / "repaired").iterdir()
    return repaired


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    python = environment(tmp_path_factory.mktemp("installed") / "venv")
    install(python, wheel)
    return python


def contents(path):
    """The files in a wheel, without those of its description."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    return {Path(name) for name in names if ".dist-info/" not in name}


def names_when_installed():
    """Each file of the package in the checkout, under the name that it is installed by."""
    for name in files_of_the_checkout():
        if name.parts[0] == "quanttune":
            yield name
        if name.parts[0] == "triton_kernels":
            yield "quanttune" / name


def test_the_source_distribution_is_the_whole_checkout(source):
    held = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    held = {name for name in held if name.parts[0] != "build" and "__pycache__" not in name.parts}
    assert {name for name in held if not is_generated(name)} == files_of_the_checkout()


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    held = contents(wheel)
    (extension,) = (name for name in held if name.suffix == ".so")
    assert extension.parent == Path("quanttune")
    assert held - {extension} == set(names_when_installed())


def test_the_wheel_runs_on_the_systems_that_its_name_tells(wheel):
    """No library is grafted in, says the test above; the tag is of the symbols that are used."""
    said = " ".join(command(sys.executable, "-m", "auditwheel", "show", wheel, folder="/").split())
    tag = re.search('following platform tag: "(manylinux_.*?)"', said)[1]
    assert tag in wheel.name
    assert "libgomp" not in said


def modules_of_the_wheel():
    names = [name.with_suffix("") for name in names_when_installed() if name.suffix == ".py"]
    modules = [".".join(name.parts).removesuffix(".__init__") for name in names]
    runs = [name for name in modules if name.endswith("__main__")]
    return sorted(set(modules) - set(runs))


ROUND = """
import sys
from pathlib import Path

import onnxruntime, threadpoolctl, torch
import quanttune as qt

assert Path(qt.__file__).is_relative_to(sys.prefix), qt.__file__
assert qt.backends()["cpu"] == ("C++", "the extension is built"), qt.backends()
torch.set_num_threads(3)
x = torch.randn(4, 1 << 18)
rounded = qt.fake_quant(x, torch.tensor(0.02))
print(torch.equal(rounded, (x / 0.02).round().clamp(-128, 127) * torch.tensor(0.02)))
layers = torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4)
model = torch.nn.Sequential(*layers).eval()
x = torch.randn(32, 8)
with torch.no_grad():
    exact = model(x)
    qt.quantize(model, 8, weight_bits=7, data=[x], methods=["smoothquant"])  # not all have VNNI
    simulated = model(x)
qt.export_onnx(model, x, "model.onnx")
print(qt.verify("model.onnx", model, data=[x]).passed)
session = onnxruntime.InferenceSession("model.onnx")
(answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
error = (torch.from_numpy(answer) - simulated).norm() / exact.norm()
print(bool(error < 0.01), bool(0 < (simulated - exact).norm() / exact.norm() < 0.05))
runtimes = [i["filepath"] for i in threadpoolctl.threadpool_info() if i["user_api"] == "openmp"]
print(len(runtimes), Path(runtimes[0]).is_relative_to(Path(torch.__file__).parent.parent))
"""


IMPORTS = """
import importlib, warnings

warnings.simplefilter("ignore")
package = Path(qt.__file__).parent
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    assert Path(module.__file__).is_relative_to(package), module.__file__
print(len(sys.argv) - 1, "names")
"""


def test_a_round_of_the_installed_package_and_all_its_modules(python, tmp_path):
    """On the threads of torch. In one process, for torch takes long to import."""
    names = modules_of_the_wheel()
    assert len(names) > 150
    said = command(python, "-W", "error", "-c", ROUND + IMPORTS, *names, folder=tmp_path)
    assert "True\nTrue\nTrue True\n1 True\n" in said
    assert said.splitlines()[-1] == f"{len(names)} names"


def test_the_installed_command_line(python, tmp_path):
    quanttune = python.with_name("quanttune")
    bert_case(tmp_path)
    arguments = ["--data", "data.csv", "--out", "integers", "--batch-size", 2]
    command(quanttune, "calibrate", "model", *arguments, folder=tmp_path)
    assert (tmp_path / "integers" / "model.safetensors").exists()


# they read the docs, the benchmarks and their results, and helpers among the tests
OWN_TESTS = (
    "test_installed.py::test_the_extension_is_built_and_needs_neither_torch_nor_openmp",
    "test_benchmarks.py::test_the_gpu_suite_wants_the_names_of_sections",
    "test_support_matrix.py::test_the_committed_page_is_that_of_the_committed_results",
)


def test_the_source_distribution_runs_its_own_tests(source, python):
    tests = [source / "tests" / name for name in OWN_TESTS]
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    said = command(python, "-m", "pytest", *options, *tests, folder=source)
    assert " passed" in said
    assert "failed" not in said


def test_without_a_compiler_the_wheel_is_pure(source, tmp_path):
    tree = shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("build"))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first, said = build("wheel", tree, tmp_path / "first", **NO_COMPILER)
    assert 'building extension "quanttune._C" failed' in said
    assert first.name.endswith("-py3-none-any.whl")
    assert contents(first) == set(names_when_installed())
    with zipfile.ZipFile(first) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("dist-info/WHEEL"))
        assert b"Root-Is-Purelib: true" in archive.read(name)
    # what an earlier build left is not in the next one
    (tree / "quanttune" / "masks.py").unlink()
    second, _ = build("wheel", tree, tmp_path / "second", **NO_COMPILER)
    assert contents(first) - contents(second) == {Path("quanttune/masks.py")}


def test_the_doctors_remedy_builds_the_extension(source, wheel, tmp_path):
    """wheel: compiles before, so that the remedy only links."""
    python = environment(tmp_path / "venv")
    install(python, source, **NO_COMPILER)
    doctor = ["-W", "ignore", "-m", "quanttune.cli", "doctor"]
    said = command(python, *doctor, folder=tmp_path)
    assert "cpu    reference: the C++ extension does not load: No module named" in said
    (remedy,) = (line for line in said.splitlines() if "install g++ and run:" in line)
    arguments = shlex.split(remedy.partition("run: ")[2])
    assert arguments[-1] == str(source)
    command(*arguments, folder=tmp_path, **OFFLINE, **QUICK)
    said = command(python.with_name("quanttune"), "doctor", folder=tmp_path)
    assert "cpu    C++: the extension is built" in said


def test_the_tests_refuse_a_package_of_another_checkout(tmp_path):
    for folder in ("tests", "quanttune"):
        (tmp_path / folder).mkdir()
    for file in ("conftest.py", "slow.py"):
        shutil.copy2(ROOT / "tests" / file, tmp_path / "tests")
    (tmp_path / "quanttune" / "__init__.py").touch()
    (tmp_path / "tests" / "test_nothing.py").write_text("def test_nothing():\n    pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert f"the tests of {tmp_path} would run on" in done.stderr
