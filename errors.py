"""The one exception whose text is meant for the person at the keyboard."""

from typing import final


@final
class UserError(Exception):
    """A mistake of the user or of the machine that a few clear lines explain: wanted, got, remedy, the flag.

    The command line prints the text without a traceback and exits with code 1.
    """
