"""Stop on request: SIGTERM and SIGUSR1 end the run after the current step, with a checkpoint.

Before training has begun they end the run at once, as SIGINT (Ctrl-C) always does. A second SIGTERM changes nothing,
since launchers send several. The exit status REQUEUE tells a scheduler that the same command line resumes the run.
"""

from __future__ import annotations

import signal
from typing import Optional

REQUEUE = 75  # EX_TEMPFAIL: try again


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or a signal with nothing to save."""


class StopRequest:
    """Handle the signals; `asked` is the name of the one that asked for a stop at the next step boundary."""

    def __init__(self) -> None:
        self.asked: Optional[str] = None
        self.training = False  # set by the trainer: from here on there is something to save

    def install(self) -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(each, self._handle)

    def _handle(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if number != signal.SIGINT and self.training:
            self.asked = self.asked or name
            return
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(name)
