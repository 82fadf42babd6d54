"""Source distributions and wheels of this checkout, and environments to install them in."""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# optimized code takes the compiler five times as long, and computes the same bits
QUICK = {"QUANTTUNE_CXXFLAGS": "-O0 -g0"}
NO_COMPILER = {"CC": "false", "CXX": "false"}
OFFLINE = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_DEPS": "1"}


def command(*arguments, folder, **environment):
    """Run a command elsewhere, and return what it said; where it fails, that is the error."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*map(str, arguments)],
        cwd=folder, env={**os.environ, "PATH": tools, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def files_of_the_checkout():
    """Return what git knows or would add; an unpacked source distribution has a list instead."""
    if (ROOT / ".git").exists():
        listed = command(
            "git", "ls-files", "--cached", "--others", "--exclude-standard", folder=ROOT
        )
    else:
        listed = (ROOT / "quanttune.egg-info" / "SOURCES.txt").read_text()
    names = {Path(line) for line in listed.splitlines()}
    return {name for name in names if (ROOT / name).is_file() and not is_generated(name)}


def is_generated(name):
    return name.parts[0] in ("PKG-INFO", "setup.cfg", "quanttune.egg-info")


def build(kind, source, out, **environment):
    """Build "sdist" or "wheel" as pip does, but with the setuptools that is here."""
    script = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    said = command(sys.executable, "-W", "ignore", "-c", script, folder=source, **environment)
    (made,) = out.iterdir()
    return made, said


def unpack(archive, folder):
    folder.mkdir()
    command("tar", "xf", archive, "-C", folder, folder="/")  # of Python's, 3.11.2 knows no filter
    (unpacked,) = folder.iterdir()
    return unpacked


def environment(folder):
    """Make an environment whose other packages are those of this one, and return its Python."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    own = command(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder="/"
    )
    (Path(own.strip()) / "others.pth").write_text("\n".join(packages))
    return python


def install(python, what, **environment):
    """Install without a look at any index, and leave the quanttune of the other packages alone."""
    arguments = ["-m", "pip", "install", "--quiet", "--force-reinstall", "--no-cache-dir", what]
    command(python, *arguments, folder="/", **OFFLINE, **environment)
