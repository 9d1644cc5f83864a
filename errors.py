"""Exceptions whose text is meant for the person at the keyboard."""

import signal
from pathlib import Path
from typing import final


@final
class UserError(Exception):
    """A mistake of the user or of the machine that a few clear lines explain: wanted, got, remedy, the flag.

    The command line prints the text without a traceback and exits with code 1.
    """


@final
class StoppedBySignal(Exception):
    """Training has stopped in good order, because a signal asked for it.

    Attributes:
        signum: The signal's number.
        checkpoint: What was saved, None if nothing was.
    """

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.checkpoint = checkpoint
