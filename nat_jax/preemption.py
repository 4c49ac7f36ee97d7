"""Ctrl-C and SIGTERM: finish the step, save, and exit with a documented code."""

import logging
import signal
import threading
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)


class Preempted(SystemExit):
    """Training stopped on a signal, with its state saved.

    The exit code is 128 plus the signal's number, as shells have it: 130 after Ctrl-C, 143 after
    SIGTERM.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(128 + signal_number)
        self.step = step


class StopOnSignal:
    """Context in which SIGTERM and Ctrl-C ask for a stop instead of ending the process at once.

    A second Ctrl-C raises KeyboardInterrupt. Outside the main thread (a notebook's worker, say)
    Python allows no handlers, and nothing is changed.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        logger.warning(
            "%s: stopping after this step or evaluation; the same command line goes on from there"
            "%s",
            signal.Signals(number).name,
            ". Ctrl-C once more stops at once" if number == signal.SIGINT else "",
        )
