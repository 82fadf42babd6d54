"""Commands that mend what `quanttune doctor` finds missing."""

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

# Without the cache: there pip keeps the wheel that it built while there was no compiler.
_AGAIN = ("--force-reinstall", "--no-deps", "--no-cache-dir")


def of_extension() -> str:
    """Tell how to install this quanttune again, with its C++ kernels, from where it came."""
    sources = _sources()
    if sources:
        return f"install g++ and run: {_pip(*_AGAIN, *sources)}"
    return (
        "install g++, and in a checkout or an unpacked source distribution of quanttune "
        f"run: {_pip(*_AGAIN, '.')}"
    )


def of_triton() -> str:
    """Tell how to install the Triton that the installed torch asks for, or else the newest."""
    wanted = [line.partition(";")[0].strip() for line in requires("torch") or ()]
    return _pip(next((name for name in wanted if name.startswith("triton")), "triton"))


def _pip(*arguments: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *arguments])


def _sources() -> list[str]:
    """Return what pip would build the package from; nothing, where it came as a wheel."""
    try:
        recorded = distribution("quanttune").read_text("direct_url.json")
    except PackageNotFoundError:
        recorded = None
    if not recorded:
        return []
    origin = json.loads(recorded)
    url = origin["url"]
    if url.endswith(".whl"):
        return []
    if version := origin.get("vcs_info"):
        return [f"quanttune @ {version['vcs']}+{url}@{version['commit_id']}"]
    return _local(origin) if url.startswith("file:") else [f"quanttune @ {url}"]


def _local(origin: dict[str, Any]) -> list[str]:
    """Return a folder or an archive, if it is still there; a folder as it was installed."""
    source = Path(url2pathname(urlsplit(origin["url"]).path))
    if not source.exists():
        return []
    editable = origin.get("dir_info", {}).get("editable", False)
    return ["--editable"] * editable + [str(source)]
