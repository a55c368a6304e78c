"""Ctrl-C as an event, so that a measurement ends early with a report of what there is."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Let the first Ctrl-C (or SIGTERM) set the event; the next one ends the program as usual."""
    interrupted = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def interrupt(number: int, frame: object) -> None:
        interrupted.set()
        restore()

    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield interrupted
    finally:
        restore()
