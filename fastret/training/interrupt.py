"""Ctrl-C between two iterations instead of within one, so that what is then saved is a state the run passes through."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run was stopped by the user; the message says how to go on."""


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Within the block a first Ctrl-C sets the event; a second one interrupts at once, as ever."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # Python delivers signals to the main thread alone
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        # None: the handler was not installed from Python and cannot be put back.
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
