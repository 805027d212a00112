"""Hear of signals at once, in a thread: Python handles them in the main thread, which a collective may hold up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

Listener = Callable[[int], None]
# A process has one descriptor that its signals are written to, so all listeners share it.
_listeners: list[Listener] = []


def hear(listener: Listener) -> None:
    """Call `listener` with the number of each signal that has a handler, in a thread. For the main thread."""
    if listener in _listeners:
        return
    _listeners.append(listener)
    if len(_listeners) > 1:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_pass_on, args=(reader,), name="signals", daemon=True).start()


def forget(listener: Listener) -> None:
    """Call `listener` no more. For the main thread."""
    if listener in _listeners:
        _listeners.remove(listener)
        if not _listeners and (writer := signal.set_wakeup_fd(-1)) >= 0:
            os.close(writer)  # which ends the thread


def _pass_on(reader: int) -> None:
    """Pass each byte of the pipe, the number of a signal, to the listeners."""
    while number := os.read(reader, 1):
        for listener in [*_listeners]:
            listener(number[0])
    os.close(reader)
