"""The commands that `quanttune doctor` tells, for each way in which the package may have come."""

import importlib.metadata
import json
import shlex
import sys

import pytest
from packaging.requirements import Requirement

from quanttune.cli import remedies

AGAIN = [sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps", "--no-cache-dir"]


@pytest.fixture
def came(monkeypatch):
    """Let the package have come from somewhere, by what pip records of it."""

    def record(origin):
        class Installed:
            def read_text(self, name):
                assert name == "direct_url.json"
                return None if origin is None else json.dumps(origin)

        monkeypatch.setattr(remedies, "distribution", lambda name: Installed())

    return record


def command():
    said = remedies.of_extension()
    assert said.startswith("install g++")
    arguments = shlex.split(said.partition("run: ")[2])
    assert arguments[: len(AGAIN)] == AGAIN
    return arguments[len(AGAIN) :]


@pytest.mark.parametrize("editable", [False, True])
def test_a_folder_is_installed_as_it_was(editable, came, tmp_path):
    folder = tmp_path / "my checkout"
    folder.mkdir()
    came({"url": folder.as_uri(), "dir_info": {"editable": True} if editable else {}})
    assert command() == ["--editable"] * editable + [str(folder)]


def test_an_archive_is_built_once_more(came, tmp_path):
    archive = tmp_path / "quanttune-0.1.0.tar.gz"
    archive.touch()
    came({"url": archive.as_uri(), "archive_info": {"hash": "sha256=0"}})
    assert command() == [str(archive)]


@pytest.mark.parametrize("url", ["https://example.org/a/quanttune.git", "file:///srv/quanttune"])
def test_a_repository_is_taken_at_the_same_commit(url, came):
    came({"url": url, "vcs_info": {"vcs": "git", "commit_id": "62c8844"}})
    (requirement,) = command()
    assert Requirement(requirement).name == "quanttune"
    assert Requirement(requirement).url == f"git+{url}@62c8844"


def test_an_archive_of_the_web(came):
    url = "https://example.org/quanttune-0.1.0.tar.gz"
    came({"url": url, "archive_info": {}})
    (requirement,) = command()
    assert Requirement(requirement).url == url


@pytest.mark.parametrize(
    "origin",
    [
        None,  # an index, or no installer that records it
        {"url": "file:///srv/quanttune-0.1.0-py3-none-any.whl", "archive_info": {}},
        {"url": "https://example.org/quanttune-0.1.0-py3-none-any.whl", "archive_info": {}},
        {"url": "file:///no/such/folder", "dir_info": {}},
    ],
)
def test_where_there_are_no_sources_some_must_be_found(origin, came):
    came(origin)
    assert "in a checkout or an unpacked source distribution" in remedies.of_extension()
    assert command() == ["."]


def test_a_package_that_is_not_installed_at_all(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(remedies, "distribution", missing)
    assert command() == ["."]


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (['triton==3.5.1; platform_system == "Linux"', "sympy"], "triton==3.5.1"),
        (["sympy>=1.13"], "triton"),
        (None, "triton"),
    ],
)
def test_triton_is_the_one_that_torch_asks_for(asked, wanted, monkeypatch):
    monkeypatch.setattr(remedies, "requires", lambda name: asked)
    assert shlex.split(remedies.of_triton()) == [*AGAIN[:4], wanted]
