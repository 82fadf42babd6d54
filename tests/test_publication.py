"""Folders that several processes want: one gets them, whole."""

from contextlib import contextmanager

import pytest
from oracle import quiet

from quanttune.jobs import publication
from quanttune.jobs.publication import publish, reserved

pytestmark = quiet


class Part:
    """Writes a file, as models and tokenizers do."""

    def __init__(self, name):
        self.name = name

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / self.name).write_text(self.name)


def contents(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("is_there", [False, True])
def test_the_second_is_refused(is_there, tmp_path):
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
    with reserved(out):
        with pytest.raises(ValueError, match="another process is at work in"), reserved(out):
            pass
        publish(Part("model"), Part("words"), out)
    assert contents(tmp_path) == ["out", "out/model", "out/words"]
    with pytest.raises(ValueError, match="out is not empty: choose another --out"), reserved(out):
        pass
    assert contents(tmp_path) == ["out", "out/model", "out/words"]


def test_a_folder_that_another_process_has_just_published(tmp_path, monkeypatch):
    out, held = tmp_path / "out", publication.held

    @contextmanager
    def late(folder):
        publish(Part("model"), Part("words"), out)
        with held(folder):
            yield

    monkeypatch.setattr(publication, "held", late)
    with pytest.raises(ValueError, match="is not empty"), reserved(out):
        pass
    assert contents(tmp_path) == ["out", "out/model", "out/words"]


@pytest.mark.parametrize("is_gone", [False, True])
def test_a_folder_that_was_there_first_and_became_another_s(is_gone, tmp_path, monkeypatch):
    """The other process was at work when this one looked, and done when this one held its lock."""
    out, acquire = tmp_path / "out", publication.FileLock.acquire

    def late(lock):
        monkeypatch.setattr(publication.FileLock, "acquire", acquire)
        publish(Part("model"), Part("words"), out)
        if is_gone:
            raise FileNotFoundError  # where the folder went while the lock was being made
        acquire(lock)

    (tmp_path / ".out").mkdir()
    monkeypatch.setattr(publication.FileLock, "acquire", late)
    with pytest.raises(ValueError, match="is not empty"), reserved(out):
        pass
    assert contents(tmp_path) == ["out", "out/model", "out/words"]


def test_what_comes_during_the_work_stays(tmp_path):
    out = tmp_path / "out"

    def work():
        with reserved(out):
            Part("other").save_pretrained(out)
            publish(Part("model"), Part("words"), out)

    with pytest.raises(ValueError, match="is not empty"):
        work()
    assert contents(out) == ["other"]
    assert contents(tmp_path / ".out") == ["model", "words"]  # nothing that took long is lost
