"""A forward that stops on its way, so that many of them go through a model together."""

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from threading import Semaphore
from typing import Any, Generic, TypeVar

import torch

from .running import StopForward

Stop = TypeVar("Stop")


class NoThread(RuntimeError):
    """The system gives no more threads."""


class SteppedForward(Generic[Stop]):
    """A forward in a thread of its own, which runs only while `advance` waits for it.

    It begins with the first `advance`; whoever calls that sees to it that `stop` is called.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self._go, self._there = Semaphore(0), Semaphore(0)
        self._at: Stop | None = None  # where it waits; None once it has ended
        self._leaving = False
        self._thread = ThreadPoolExecutor(1)
        self._end: Future[None] | None = None

    def advance(self) -> Stop | None:
        """Run to the next stop and return it, or to the end.

        Raises:
            NoThread: it cannot begin.
        """
        end = self._end or self._begin()
        if not end.done():
            self._at = None
            self._go.release()
            self._there.acquire()
        if end.done():
            end.result()  # raises what was raised in the forward
        return self._at

    def wait_at(self, at: Stop) -> None:
        """Wait, within the forward, until it is to go on."""
        _let_workers_go()
        self._at = at
        self._there.release()
        self._go.acquire()
        if self._leaving:
            raise StopForward

    def stop_at_the_end_of(self, undo: ExitStack) -> None:
        """Let a stack call `stop`: twice, since Ctrl-C may end the first call."""
        undo.callback(self.stop)
        undo.callback(self.stop)

    def stop(self) -> None:
        """End it, wherever it is."""
        self._leaving = True
        self._go.release()
        self._thread.shutdown()

    def _begin(self) -> "Future[None]":
        try:
            self._end = self._thread.submit(self._main)
        except RuntimeError as error:
            raise NoThread(
                "the system gives no more threads, of which each batch takes one at a time: pass "
                f"the data in fewer, larger batches ({error})"
            ) from error
        self._end.add_done_callback(lambda _: self._there.release())
        return self._end

    def _main(self) -> None:
        self._go.acquire()
        if not self._leaving:
            self._run()


def _let_workers_go() -> None:
    """End the threads that OpenMP keeps for this one: else each forward holds one per core."""
    if torch.get_num_threads() > 1 and (pause := _openmp_pause()):
        pause(1)  # omp_pause_soft; it begins again by itself


@cache
def _openmp_pause() -> Any:
    """Return omp_pause_resource_all of the runtime that torch runs on, if it has OpenMP 5.0."""
    found = (
        getattr(ctypes.CDLL(path), "omp_pause_resource_all", None)
        for path in (None, torch._C.__file__)
    )
    return next(filter(None, found), None)
