"""Spaces retries: at a steady interval while all goes well, less and less often while it fails."""

from __future__ import annotations


class Backoff:
    """The pause before the next attempt, in seconds: `interval_s` after a success, doubled after each failure."""

    def __init__(self, interval_s: float, longest_s: float = 60.0) -> None:
        self.interval_s = interval_s
        self.longest_s = longest_s
        self._pause_s = interval_s

    def pause_s(self, *, has_failed: bool) -> float:
        """The pause after an attempt."""
        self._pause_s = min(2 * self._pause_s, self.longest_s) if has_failed else self.interval_s
        return self._pause_s
