"""The one place that writes to the terminal, so that a caller can silence or redirect the whole project."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class Console:
    """Writes lines for the user: results to stdout, problems to stderr, each flushed at once."""

    def __init__(self) -> None:
        self.is_silent = False

    def print(self, text: str) -> None:
        """Writes a line to stdout."""
        if not self.is_silent:
            print(text, flush=True)

    def error(self, text: str) -> None:
        """Writes a line to stderr; a silenced console does so as well."""
        print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """Drops what `print` is given while the block runs."""
        previous, self.is_silent = self.is_silent, True
        try:
            yield
        finally:
            self.is_silent = previous


console = Console()
