"""Ctrl-C and the request to terminate, put off until the work between two looks is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class DeferredSignals:
    """What was asked for, and who would have heard it.

    Attributes:
        requested: The signal that came, SIGTERM if both did, or None.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._came: set[int] = set()
        self._handlers: dict[int, Any] = {}  # those of the program

    def raise_requested(self) -> None:
        """Do what was asked for, if anything was.

        A handler of the program's own is called, and decides: if it returns, all goes on.

        Raises:
            KeyboardInterrupt: If it was SIGINT, as Python does.
            SystemExit: If it was SIGTERM, with the exit code of a process ended by it.
        """
        signum, self.requested = self.requested, None
        if signum is None:
            return
        self._came.clear()
        handler = self._handlers[signum]
        if callable(handler) and handler is not signal.default_int_handler:
            handler(signum, None)
        elif signum == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + signum)

    def _install(self, signum: int) -> None:
        handler = signal.getsignal(signum)
        if handler not in (signal.SIG_IGN, None):  # None: not of Python
            self._handlers[signum] = handler
            signal.signal(signum, self._note)

    def _put_back(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: Any) -> None:
        """Remember the first of its kind; the second acts as if none was ever put off."""
        if signum in self._came:
            self._put_back()  # here, as what is raised may cut short the end of the context
            signal.raise_signal(signum)
            return
        self._came.add(signum)
        if self.requested != signal.SIGTERM:
            self.requested = signal.Signals(signum)


@contextmanager
def deferred_signals(sigterm: bool = False) -> Iterator[DeferredSignals]:
    """Note the first Ctrl-C instead of raising it; a second one acts at once.

    Whoever leaves the context with a signal noted calls
    :meth:`~DeferredSignals.raise_requested`, or has found another answer to it. Outside the main
    thread, where Python lets nobody handle signals, nothing changes; nor does it for a signal
    that is ignored, or inside another such context, which goes on.

    Args:
        sigterm: Whether to do the same for SIGTERM, by which schedulers announce the end.

    Example:
        >>> with deferred_signals() as signals:
        ...     signal.raise_signal(signal.SIGINT)
        ...     signals.requested.name
        'SIGINT'
    """
    if threading.current_thread() is not threading.main_thread():
        yield DeferredSignals()
        return
    if (outer := outer_signals()) is not None:
        yield outer
        return
    deferred = DeferredSignals()
    try:
        for signum in SIGNALS[:1 + sigterm]:
            deferred._install(signum)
        yield deferred
    finally:
        deferred._put_back()


def outer_signals() -> DeferredSignals | None:
    """The context inside which this one is, if any."""
    owners = [getattr(signal.getsignal(signum), "__self__", None) for signum in SIGNALS]
    return next((owner for owner in owners if isinstance(owner, DeferredSignals)), None)
