"""Signals that ask a command to stop: Ctrl-C, and what schedulers (SIGTERM; SIGUSR1 where they are asked to warn) and closed terminals send."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A signal asked to stop.

    Args:
        number: of the signal; the command line exits with 128 + number.
        when: what was done before, for people to read.
    """

    def __init__(self, number: int, when: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{when}")
        self.number = number


def heeded() -> list[signal.Signals]:
    """The signals to listen to: those that are not ignored, as nohup has it, nor handled outside Python; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextmanager
def stoppable() -> Iterator[None]:
    """Here each of the signals raises `Stopped` at once, as Ctrl-C raises KeyboardInterrupt: so readers are ended, and people
    are told.
    """

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Here a signal waits for the end: an exception that its handler raised in Python code called from C++ could abort the process."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in heeded()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for waiting in came:
            signal.raise_signal(waiting)
