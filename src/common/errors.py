"""What a user is told in one line instead of a traceback."""

from __future__ import annotations

import errno

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # what a full disk, a quota and a limit answer


class Failure(Exception):
    """A failure that one line explains: what was wrong, where, and the remedy. Commands print it and exit with 1."""


class Lost(Failure):
    """One of a run's processes was killed: nothing is wrong with the run itself, which goes on from its checkpoint."""


class ConfigError(Failure):
    """One line per fault: the key's path, the value, what is allowed."""
