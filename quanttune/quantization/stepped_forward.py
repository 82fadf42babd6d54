"""A forward that stops on its way, so that many of them go through a model together."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore
from typing import Generic, TypeVar

from .running import StopForward

Stop = TypeVar("Stop")


class SteppedForward(Generic[Stop]):
    """A forward in a thread of its own, which runs only while `advance` waits for it."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._go, self._there = Semaphore(0), Semaphore(0)
        self._at: Stop | None = None  # where it waits; None once it has ended
        self._leaving = False
        self._thread = ThreadPoolExecutor(1)
        self._end = self._thread.submit(self._main, run)
        self._end.add_done_callback(lambda _: self._there.release())

    def advance(self) -> Stop | None:
        """Run to the next stop and return it, or to the end."""
        if not self._end.done():
            self._at = None
            self._go.release()
            self._there.acquire()
        if self._end.done():
            self._end.result()  # raises what was raised in the forward
        return self._at

    def wait_at(self, at: Stop) -> None:
        """Wait, within the forward, until it is to go on."""
        self._at = at
        self._there.release()
        self._go.acquire()
        if self._leaving:
            raise StopForward

    def stop(self) -> None:
        """End it, wherever it is."""
        self._leaving = True
        self._go.release()
        self._thread.shutdown()

    def _main(self, run: Callable[[], object]) -> None:
        self._go.acquire()
        if not self._leaving:
            run()
