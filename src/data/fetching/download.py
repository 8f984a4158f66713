"""Downloads over https: resumed, retried and bounded in time; a file gets its final name only when it is complete."""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from src.common.credentials import masked
from src.common.files import sha256_of
from src.data.fetching.files import BY_HAND, SourceError, disk_errors, is_html, move_verified

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

_CHUNK = 1 << 16  # the most bytes that one read from the network asks for
_MAX_REDIRECTS = 10
_MAX_PAUSE = 60  # seconds between attempts, whatever Retry-After asks for
_WEB_PAGE = "serves a web page, not an archive (a sign-in, consent or error page)"


@dataclass(frozen=True)
class Limits:
    """How long a download may take: `attempts` in a row and per mirror without a new byte, and times in seconds."""

    attempts: int = 4
    backoff: float = 1  # before the second attempt; doubles from attempt to attempt
    connect_timeout: float = 10
    stall_timeout: float = 30  # without a byte
    total: float = 3600


def fetch(
    urls: Sequence[str], destination: Path, *, sha256: str | None, partial_dir: Path, limits: Limits = Limits()
) -> str:
    """Downloads the file that `urls` (mirrors, tried in order) serve to `destination` and returns its sha256.

    An incomplete file waits in `partial_dir`, which may lie on another file system, and is resumed by the next attempt,
    mirror or call. A destination with the right `sha256` is not downloaded again. Plain http is accepted only if
    `sha256` (64 lower-case hex digits) proves the content, or the host is this machine; None accepts what https
    delivers.

    Raises:
        SourceError: no mirror delivered the file, the time limit passed, or the disk is full.
    """
    import requests
    from filelock import FileLock, Timeout

    key = sha256 or hashlib.sha256("\n".join(urls).encode()).hexdigest()
    partial = _Partial(partial_dir / f"{key}.partial", partial_dir / f"{key}.origin")
    with disk_errors(partial.path):
        partial_dir.mkdir(parents=True, exist_ok=True)
        try:
            # Of two runs that need the same archive, the second waits and then finds it in place.
            lock = FileLock(partial_dir / f"{key}.lock", timeout=limits.total).acquire()
        except Timeout:
            raise SourceError(
                f"{destination.name}: another process still downloads it after {limits.total:g} s: "
                "wait, or end that one"
            ) from None
        with lock, requests.Session() as session:
            if sha256 and destination.is_file() and sha256_of(destination) == sha256:
                return sha256
            digest = _Download(destination.name, partial, sha256, limits, session).run(urls)
            move_verified(partial.path, destination, digest)
            partial.remove()
            return digest


class _Interrupted(Exception):
    """The attempt failed and another may succeed; `pause` is the time in seconds that the host asked to wait."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class _Refused(Exception):
    """This mirror will not deliver the file."""


@dataclass(frozen=True)
class _Partial:
    """An incomplete file, and beside it its origin: a digest of the address and the version (ETag or date)."""

    path: Path
    origin: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self, url: str) -> str | None:
        """The validator for If-Range, if the file came from `url` and the host sent one."""
        if not self.origin.exists():
            return None
        origin, _, validator = self.origin.read_text().partition(" ")
        return validator if validator and origin == _digest_of(url) else None

    def restart(self, url: str, validator: str | None) -> None:
        self.path.write_bytes(b"")
        self.origin.write_text(f"{_digest_of(url)} {validator or ''}")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.origin.unlink(missing_ok=True)


class _Download:
    """One file, downloaded from the first mirror that delivers it into its partial."""

    def __init__(
        self, name: str, partial: _Partial, sha256: str | None, limits: Limits, session: requests.Session
    ) -> None:
        self.name = name
        self.partial = partial
        self.sha256 = sha256
        self.limits = limits
        self.session = session
        self.deadline = time.monotonic() + limits.total

    def run(self, urls: Sequence[str]) -> str:
        """Completes and verifies the partial and returns its sha256."""
        if self.sha256 and self.partial.size and sha256_of(self.partial.path) == self.sha256:
            return self.sha256
        reasons = []
        for url in urls:
            try:
                return self._from_mirror(url)
            except _Refused as error:
                reasons.append(f"{_shown(url)}: {error}")
        raise SourceError(f"cannot fetch {self.name}: {'; '.join(reasons)}. Try again, or {BY_HAND}")

    def _from_mirror(self, url: str) -> str:
        largest, failures = self.partial.size, 0
        while True:
            try:
                return self._attempt(url)
            except _Interrupted as error:
                if self.partial.size > largest:
                    largest, failures = self.partial.size, 0
                failures += 1
                if failures >= self.limits.attempts:
                    raise _Refused(f"{error} (attempt {failures} of {self.limits.attempts})") from error
                pause = min(max(self.limits.backoff * 2 ** (failures - 1), error.pause), _MAX_PAUSE)
                log.warning("%s: %s; trying again in %.3g s", _shown(url), error, pause)
                time.sleep(min(pause, self._time_left()))

    def _attempt(self, url: str) -> str:
        """One request, read to its end: returns the sha256 of the completed partial."""
        import requests
        import urllib3

        offset, validator = self.partial.size, self.partial.version(url)
        if not (self.sha256 or validator):
            offset = 0  # nothing would show that the missing part belongs to the same file
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if validator:
                headers["If-Range"] = validator
        try:
            with self._open(url, headers) as response:
                self._receive(url, response, offset)
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            raise _Interrupted(_root_cause(error)) from error
        except (requests.RequestException, ValueError) as error:  # an address or header that cannot be parsed
            raise _Refused(_root_cause(error)) from error
        return self._verify(is_resumed=offset > 0)

    def _open(self, url: str, headers: dict[str, str]) -> requests.Response:
        """Follows redirects itself, so that every address is checked before it is requested."""
        for _ in range(_MAX_REDIRECTS):
            self._check_address(url)
            left = self._time_left()
            timeout = (min(self.limits.connect_timeout, left), min(self.limits.stall_timeout, left))
            response = self.session.get(url, headers=headers, stream=True, allow_redirects=False, timeout=timeout)
            if not response.is_redirect:
                return response
            target = urljoin(url, response.headers["Location"])
            response.close()
            if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
                raise _Refused(f"redirects from https to {_shown(target)}, which is not secure")
            url = target
        raise _Refused(f"redirects more than {_MAX_REDIRECTS} times")

    def _check_address(self, url: str) -> None:
        parts = urlsplit(url)
        http_is_safe = self.sha256 is not None or _is_loopback(parts.hostname)
        if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and http_is_safe)):
            raise _Refused(f"{_shown(url)} is not an https address (plain http needs a sha256)")

    def _receive(self, url: str, response: requests.Response, offset: int) -> None:
        """Appends the body to the partial; restarts the partial where the response does."""
        status, headers = response.status_code, response.headers
        content_range = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", "").strip())
        start, total = content_range.groups() if content_range else (None, None)
        if status == 416 and offset:
            if total == str(offset):
                return  # already complete
            self.partial.remove()
            raise _Interrupted("the file has changed since the last attempt")
        if status == 429 or status >= 500:
            raise _Interrupted(f"HTTP {status} {response.reason}", pause=_retry_after(response))
        if status not in (200, 206):
            raise _Refused(f"HTTP {status} {response.reason}")
        if headers.get("Content-Type", "").partition(";")[0].strip().lower() in ("text/html", "application/xhtml+xml"):
            raise _Refused(_WEB_PAGE)
        if status == 206 and start != str(offset):
            self.partial.remove()
            raise _Interrupted(f"sent bytes from {start}, not from {offset} as requested")
        if status == 200:
            total = headers.get("Content-Length", "")
            self.partial.restart(url, _validator(response))

        size, expected_size = self.partial.size, int(total) if total and total.isdigit() else None
        progress = _Progress(self.name, expected_size)
        with self.partial.path.open("ab") as file:
            # read1 returns the bytes that are there, so the time limit holds against a host that drips.
            while chunk := response.raw.read1(_CHUNK, decode_content=False):
                file.write(chunk)
                file.flush()  # survives a kill
                size += len(chunk)
                progress.show(size)
                self._time_left()
        if expected_size is not None and size != expected_size:
            raise _Interrupted(f"the connection closed after {size:,} of {expected_size:,} bytes")

    def _verify(self, *, is_resumed: bool) -> str:
        digest, is_web_page = sha256_of(self.partial.path), is_html(self.partial.path)
        if digest == self.sha256 or (self.sha256 is None and self.partial.size and not is_web_page):
            return digest
        is_empty = not self.partial.size
        self.partial.remove()
        if is_resumed:
            raise _Interrupted("the resumed file is not the expected one, starting anew")
        if is_web_page:
            raise _Refused(_WEB_PAGE)
        if is_empty:
            raise _Refused("serves an empty file")
        raise _Refused(
            f"sha256 is {digest}, expected {self.sha256}: the host serves another file, or it was altered on the way"
        )

    def _time_left(self) -> float:
        """Seconds until the time limit; raises SourceError when it has passed."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise SourceError(
                f"{self.name}: not complete after {self.limits.total:g} s ({self.partial.size:,} bytes arrived): "
                f"run again to go on from there, or {BY_HAND}"
            )
        return left


def _digest_of(url: str) -> str:
    """Names an address without keeping the credentials that it may hold."""
    return hashlib.sha256(url.encode()).hexdigest()


def _shown(url: str) -> str:
    """An address for a message: without its query and fragment, which may hold secrets of any name."""
    return masked(re.sub(r"[?#].*", "", url, flags=re.DOTALL))


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _validator(response: requests.Response) -> str | None:
    """The version of the file for If-Range: a strong ETag, else the date (RFC 9110, 13.1.5)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _retry_after(response: requests.Response) -> float:
    """The pause that the host asks for, in seconds; 0 if it asks for none."""
    from urllib3.util import Retry

    return Retry().get_retry_after(response.raw) or 0.0


def _root_cause(error: BaseException) -> str:
    """The innermost reason of a network error; the outer ones repeat it and name the address with its query."""
    while isinstance(inner := getattr(error, "reason", None) or error.__cause__ or error.__context__, BaseException):
        error = inner
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(reason.split())


class _Progress:
    """Prints a line on stderr for every tenth of a file, or every ten seconds; sizes are in bytes."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name = name
        self.total = total
        self.tenth, self.time = 0, time.monotonic()

    def show(self, size: int) -> None:
        tenth = 10 * size // self.total if self.total else 0
        if tenth > self.tenth or time.monotonic() - self.time > 10:
            self.tenth, self.time = tenth, time.monotonic()
            share = f" of {self.total / 1e6:.1f} MB ({10 * tenth} %)" if self.total else " MB"
            print(f"{self.name}: {size / 1e6:.1f}{share}", file=sys.stderr, flush=True)
