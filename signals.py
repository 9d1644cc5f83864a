"""Hearing signals while the main thread may be anywhere: in a collective, in the store, in a loader."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, final

_SAME_S = 2.0
"""A terminal and a launcher may both pass on what is one signal to the user."""


@final
class SignalListener:
    """Calls ``on_signal`` in a thread of its own for the first of ``numbers`` that comes; a later one ends the process.

    Made, and stopped, in the main thread. Handlers do nothing: Python itself writes the number into a pipe.

    Args:
        numbers: Signals to listen to.
        on_signal: Takes the number.
    """

    def __init__(self, numbers: Sequence[signal.Signals], on_signal: Callable[[int], None]) -> None:
        self._on_signal = on_signal
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._numbers = numbers
        self._previous = {number: signal.getsignal(number) for number in numbers}
        self.listen()
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # loader workers have signals of their own
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()

    def listen(self) -> None:
        """Take the signals back from whoever has set handlers of their own since."""
        for number in self._numbers:
            signal.signal(number, _ignore)

    def stop(self) -> None:
        """Give everything back."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def _run(self) -> None:
        first_at: float | None = None
        while content := os.read(self._reader, 1):
            number = content[0]
            if number not in self._numbers:
                continue
            if first_at is None:
                first_at = time.monotonic()
                self._on_signal(number)
            elif time.monotonic() > first_at + _SAME_S:
                os._exit(128 + number)


def _ignore(number: int, frame: Any) -> None:
    """Not SIG_IGN, which children would inherit and which wakes nobody."""
