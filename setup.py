"""Build script: one C++ extension without libtorch, and one folder installed under another name."""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# No -ffast-math and no contraction: a fused multiply-add rounds once where the definition rounds
# twice. That nobody watches the exception flags changes no bit, and lets loops that clamp be
# vectorized.
COMPILE = [
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
COMPILE += ["-Wall", "-Wno-psabi"]
# For checks of the kernels: sanitizers, or other instruction sets. Such a build keeps its symbols.
EXTRA = shlex.split(os.environ.get("QUANTTUNE_CXXFLAGS", ""))


class NinjaBuild(build_ext):
    """Compile the sources side by side. Without a compiler, setuptools leaves the extension out."""

    def build_extension(self, extension: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError("the kernels of quanttune need GCC or Clang")
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self._rules(extension, target))
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"ninja ended with status {error.returncode}") from error

    def _rules(self, extension: Extension, target: Path) -> str:
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags = shlex.join([*COMPILE, "-fPIC", *EXTRA, *(f"-I{path}" for path in includes)])
        objects = {Path(source).stem + ".o": Path(source).resolve() for source in extension.sources}
        libraries = shlex.join(["-fopenmp", "-lstdc++", "-lm", *(EXTRA or ["-s"])])
        compiler, linker = map(shlex.join, (self.compiler.compiler_cxx, self.compiler.linker_so))
        return "\n".join(
            [
                "rule compile",
                f"  command = {compiler} {flags} -MD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "rule link",
                f"  command = {linker} $in {libraries} -o $out",
                *(f"build {name}: compile {source}" for name, source in objects.items()),
                f"build {target}: link {' '.join(objects)}",
                "",
            ]
        )


setup(
    # A top-level `triton_kernels` is another project's import name, so the folder lives in this
    # package.
    packages=[
        "quanttune",
        "quanttune.analysis",
        "quanttune.cli",
        "quanttune.quantization",
        "quanttune.quantization.calibrators",
        "quanttune.recipes",
        "quanttune.runs",
        "quanttune.trainer",
        "quanttune.triton_kernels",
        "quanttune.tuning",
    ],
    package_dir={"quanttune": "quanttune", "quanttune.triton_kernels": "triton_kernels"},
    package_data={"quanttune": ["py.typed", "*.pyi", "analysis/*.jinja"]},
    ext_modules=[
        Extension("quanttune._C", sorted(map(str, Path("csrc").glob("*.cpp"))), optional=True)
    ],
    cmdclass={"build_ext": NinjaBuild},
)
