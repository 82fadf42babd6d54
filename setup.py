"""Build script: one C++ extension without libtorch, and one folder installed under another name."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# No -ffast-math and no contraction: a fused multiply-add rounds once where the definition rounds
# twice. That nobody watches the exception flags changes no bit, and lets loops that clamp be
# vectorized. No -fopenmp: csrc/parallel.h tells why.
COMPILE = [
    "-std=c++17",
    "-O3",
    "-pthread",
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

    def run(self) -> None:
        super().run()
        # a package without the extension is pure, and its wheel says so
        self.distribution.ext_modules = [
            extension
            for extension in self.extensions
            if Path(self.get_ext_fullpath(extension.name)).exists()
        ]

    def build_extension(self, extension: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise CompileError("the kernels of quanttune need GCC or Clang")
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._remove_earlier(extension, target)
        (folder / "build.ninja").write_text(self._rules(extension, target))
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"ninja ended with status {error.returncode}") from error

    def _remove_earlier(self, extension: Extension, target: Path) -> None:
        """Remove what an earlier build left, which would stand in for a build that fails."""
        target.unlink(missing_ok=True)
        if self.editable_mode:
            Path(self.get_ext_filename(extension.name)).unlink(missing_ok=True)

    def _rules(self, extension: Extension, target: Path) -> str:
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags = shlex.join([*COMPILE, "-fPIC", *EXTRA, *(f"-I{path}" for path in includes)])
        objects = {Path(source).stem + ".o": Path(source).resolve() for source in extension.sources}
        libraries = shlex.join(["-pthread", "-lstdc++", "-lm", *(EXTRA or ["-s"])])
        compiler = shlex.join(self.compiler.compiler_cxx)
        # without the folders in which this machine's Python looks for libraries
        linker = shlex.join(
            part for part in self.compiler.linker_so if not part.startswith("-Wl,-rpath")
        )
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


class Wheel(bdist_wheel):
    """Build first, since only then is known whether the wheel is pure, and from nothing older."""

    def run(self) -> None:
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    # A top-level `triton_kernels` is another project's import name, so the folder lives in this
    # package.
    packages=["quanttune.triton_kernels", *find_packages(include=["quanttune", "quanttune.*"])],
    package_dir={"quanttune": "quanttune", "quanttune.triton_kernels": "triton_kernels"},
    package_data={
        "quanttune": ["py.typed", "*.pyi"],
        "quanttune.report": ["*.jinja"],
        "quanttune.jobs.reproduction": ["*.csv"],
    },
    include_package_data=False,
    ext_modules=[
        Extension("quanttune._C", sorted(map(str, Path("csrc").glob("*.cpp"))), optional=True)
    ],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": Wheel},
)
