"""Ctrl-C, SIGTERM and a closed terminal, while a run or a sweep is at work."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from rlhf_pipeline.run.launch import STOP_SIGNAL


@contextlib.contextmanager
def stopping(
    can_wait: Callable[[], bool],
    stop: Callable[[], None],
    say: Callable[[str], None],
    has_begun: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Have a first signal stop what is at work where it can resume, and a second one end it all.

    Args:
        can_wait: whether something is at work, and was not yet asked to stop. Else a signal ends all at once.
        stop: asks it to stop.
        say: takes a line about that.
        has_begun: whether what is at work takes steps yet.

    Raises:
        KeyboardInterrupt: in the block, for a signal that ends all at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def taken(_number: int, _frame: FrameType | None) -> None:
        if not can_wait():
            raise KeyboardInterrupt
        when = " after this step, with a checkpoint" if has_begun() else ""
        say(f"stopping{when}; Ctrl-C once more stops at once")
        stop()

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, STOP_SIGNAL):
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` wants it so
            before[number] = signal.signal(number, taken)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
