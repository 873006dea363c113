"""SIGTERM and Ctrl-C: training stops at the end of a batch, where it can be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from recbole_ssm import distributed


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came, and a checkpoint to go on from is written; ``status`` is the exit
    status.
    """

    def __init__(self, signal_number: int, text: str) -> None:
        super().__init__(text)
        self.status = 128 + signal_number


class _StopRequest(Exception):  # noqa: N818 (nothing failed)
    """A signal came, and this is a moment at which training can be saved."""


class Signals:
    """Remembers a signal until training has come to a moment at which it can stop."""

    def __init__(self) -> None:
        self._number = 0

    @contextlib.contextmanager
    def held(self, save: Callable[[], str]) -> Iterator[None]:
        """Hold signals back while the context lasts; a second one of the same kind takes effect at once.

        Args:
            save: saves what can be saved when a signal stops training, and says what a user can
                do then.

        Raises:
            Interrupted: with what ``save`` said.
        """
        # Python handles signals in no other thread.
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            signal.signal(number, before[number])
            self._number = number

        before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except _StopRequest:
            raise Interrupted(self._number or signal.SIGTERM, save()) from None
        finally:
            self._number = 0
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_if_asked(self) -> None:
        """End the context of :meth:`held` if a signal came to any of the processes."""
        if distributed.any_of(bool(self._number)):
            raise _StopRequest
