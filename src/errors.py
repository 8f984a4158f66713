"""What a user is told in one line instead of a traceback."""


class Failure(Exception):
    """A failure that one line explains: what was wrong, where, and the remedy. Commands print it and exit with 1."""
