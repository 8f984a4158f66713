"""An orderly end on signals: the first SIGTERM or Ctrl-C is noted, the second one ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)  # a preemption, Ctrl-C


class Interruption:
    """The signal that asked this process to stop, if one did.

    `announce`: write a line to stderr when the first signal comes; of several processes of one run, one does.
    """

    def __init__(self, *, announce: bool = True) -> None:
        self.announce = announce
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @contextlib.contextmanager
    def handling(self) -> Iterator[Interruption]:
        """Handles the signals while the block runs; afterwards the previous handlers are back."""
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Installs the handlers, replacing those of a library that has put in its own."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @property
    def exit_code(self) -> int:
        """The code that shells expect of a process that a signal ended: 143 after SIGTERM, 130 after Ctrl-C."""
        return 128 + (self.signal or signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        if self.announce:  # os.write: a print could fall into the middle of another print and raise
            os.write(2, f"\n{self.signal.name}: saving, then ending (a second one ends at once)\n".encode())
