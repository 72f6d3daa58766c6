"""Signals that ask a run to stop: SIGTERM, SIGUSR1 (SLURM's `--signal`), SIGINT (Ctrl-C)."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

WORKER_SECONDS = 30
"""Seconds after SIGTERM that a worker of a DataLoader goes on, for the step that is running."""


class Stopped(BaseException):
    """A signal has asked the process to stop.

    Args:
        number: The signal.
        note: What has been saved.
    """

    def __init__(self, number: int, note: str = ""):
        super().__init__(f"stopped by {signal.Signals(number).name}{note}")
        self.code = 128 + number
        """Exit code, as a shell has it for a process that the signal ended."""


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Passes signals that ask to stop to a function; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def stop(number: int, frame: FrameType | None) -> None:
    """Raises Stopped wherever the process is."""
    del frame
    raise Stopped(number)


def ignore_signals(worker: int) -> None:
    """Leaves it to the main process of a DataLoader to stop this worker.

    Ctrl-C and schedulers send their signal to every process of a run. multiprocessing, too, ends
    workers by SIGTERM and waits for them: so that one only has a delay.
    """
    del worker
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))
