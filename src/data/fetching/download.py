"""Downloads over https: resumed, retried and bounded in time; a file gets its final name only when it is complete."""

from __future__ import annotations

import email.utils
import hashlib
import ipaddress
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from src.common.files import sha256_of
from src.data.fetching.files import BY_HAND, SourceError, disk_errors, is_html, move_verified

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

_CHUNK = 1 << 16  # the most that one read from the network asks for

_MAX_REDIRECTS = 10

_MAX_WAIT = 60.0  # seconds: the longest pause between attempts, whatever Retry-After asks for


def fetch(
    urls: Sequence[str],
    destination: Path,
    *,
    sha256: str | None,
    partial_dir: Path,
    attempts: int = 4,
    connect_timeout: float = 10,
    stall_timeout: float = 30,
    time_limit: float = 3600,
    backoff: float = 1.0,
    progress: bool | None = None,
) -> str:
    """Downloads the file that `urls` (mirrors, tried in order) serve to `destination` and returns its sha256.

    What has arrived waits in `partial_dir`, which may lie on another file system, and is resumed by the next attempt,
    mirror or call. A destination that already has the right `sha256` is left alone. Plain http is accepted only where
    `sha256` proves the content or the host is this machine.

    Args:
        sha256: what the content must hash to; None accepts what https delivers.
        attempts: tries per mirror that bring nothing new; a try that gets further starts the count again.
        connect_timeout, stall_timeout, time_limit: seconds to connect, without a byte, and over all.
        backoff: seconds before the second try; doubles from try to try.
        progress: a bar (True) or plain lines (False) on stderr; None asks whether stderr is a terminal.

    Raises:
        SourceError: no mirror delivered the file, the time limit passed, or the disk is full.
    """
    import requests
    from filelock import FileLock, Timeout

    expected = checked_sha256(sha256)
    key = expected or hashlib.sha256("\n".join(urls).encode()).hexdigest()
    partial = _Partial(partial_dir / f"{key}.partial", partial_dir / f"{key}.origin")
    with disk_errors(partial.path):
        partial_dir.mkdir(parents=True, exist_ok=True)
        try:
            # Two runs that need the same archive: the second waits, then finds it there.
            lock = FileLock(partial_dir / f"{key}.lock", timeout=time_limit).acquire()
        except Timeout:
            raise SourceError(
                f"{destination.name}: another process still fetches it after {time_limit:g} s: wait, or end that one"
            ) from None
        with lock:
            if expected and destination.is_file() and sha256_of(destination) == expected:
                return expected
            limits = _Limits(attempts, connect_timeout, stall_timeout, time_limit, backoff)
            with requests.Session() as session, _progress(destination.name, progress) as tell:
                digest = _Download(destination.name, partial, expected, limits, session, tell).run(urls)
            move_verified(partial.path, destination, digest)
            partial.remove()
            return digest


class _Retry(Exception):
    """The attempt failed, another may not; `after` is the pause in seconds that the host asked for."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class _GiveUp(Exception):
    """This mirror will not deliver the file."""


@dataclass(frozen=True)
class _Partial:
    """What has arrived so far, and beside it the address and version (ETag or date) that it is a part of."""

    path: Path
    origin: Path

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self, url: str) -> str | None:
        """The validator for If-Range, if the part came from `url` and the host gave one."""
        if not self.origin.exists():
            return None
        came_from, _, validator = self.origin.read_text().partition(" ")
        return validator if validator and came_from == _url_key(url) else None

    def restart(self, url: str, validator: str | None) -> None:
        self.path.write_bytes(b"")
        self.origin.write_text(f"{_url_key(url)} {validator or ''}")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.origin.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Limits:
    """See `fetch`; times are in seconds."""

    attempts: int
    connect_timeout: float
    stall_timeout: float
    time_limit: float
    backoff: float


class _Download:
    """One file on its way from the first mirror that delivers it into its partial."""

    def __init__(
        self,
        name: str,
        partial: _Partial,
        expected: str | None,
        limits: _Limits,
        session: requests.Session,
        tell: Callable[[int, int | None], None],
    ) -> None:
        self.name = name
        self.partial = partial
        self.expected = expected
        self.limits = limits
        self.session = session
        self.tell = tell
        self.deadline = time.monotonic() + limits.time_limit

    def run(self, urls: Sequence[str]) -> str:
        """Completes and verifies the partial and returns its sha256."""
        if self.expected and self.partial.size and sha256_of(self.partial.path) == self.expected:
            return self.expected
        reasons = []
        for url in urls:
            try:
                return self._from_mirror(url)
            except _GiveUp as error:
                reasons.append(f"{_shown(url)}: {error}")
        raise SourceError(f"cannot fetch {self.name}: {'; '.join(reasons)}. Try again, or {BY_HAND}")

    def _from_mirror(self, url: str) -> str:
        furthest, failures = self.partial.size, 0
        while True:
            try:
                return self._attempt(url)
            except _Retry as error:
                if self.partial.size > furthest:
                    furthest, failures = self.partial.size, 0
                failures += 1
                if failures >= self.limits.attempts:
                    raise _GiveUp(f"{error} (attempt {failures} of {self.limits.attempts})") from error
                pause = min(max(self.limits.backoff * 2 ** (failures - 1), error.after), _MAX_WAIT)
                log.warning("%s: %s; trying again in %.3g s", _shown(url), error, pause)
                time.sleep(min(pause, self._time_left()))

    def _attempt(self, url: str) -> str:
        """One request, read to its end: returns the sha256 of the completed partial."""
        import requests
        import urllib3

        offset, validator = self.partial.size, self.partial.version(url)
        if not (self.expected or validator):
            offset = 0  # nothing would tell that the rest belongs to the same file
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if validator:
                headers["If-Range"] = validator
        try:
            with self._open(url, headers) as response:
                self._receive(url, response, offset)
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            raise _Retry(_root_cause(error)) from error
        except (requests.RequestException, ValueError) as error:  # an address or header that cannot be parsed
            raise _GiveUp(_root_cause(error)) from error
        return self._verified(resumed=offset > 0)

    def _open(self, url: str, headers: dict[str, str]) -> requests.Response:
        """Follows redirects itself, so that each address is checked before it is asked."""
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
                raise _GiveUp(f"redirects from https to {_shown(target)}, which is not secure")
            url = target
        raise _GiveUp(f"redirects more than {_MAX_REDIRECTS} times")

    def _check_address(self, url: str) -> None:
        parts = urlsplit(url)
        proven = self.expected is not None or _is_loopback(parts.hostname)
        if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and proven)):
            raise _GiveUp(f"{_shown(url)} is not an https address (plain http needs a sha256)")

    def _receive(self, url: str, response: requests.Response, offset: int) -> None:
        """Appends what the response brings to the partial; restarts the partial where the response starts anew."""
        status, headers = response.status_code, response.headers
        content_range = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers.get("Content-Range", "").strip())
        start, total = content_range.groups() if content_range else (None, None)
        if status == 416 and offset:
            if total == str(offset):
                return  # complete already
            self.partial.remove()
            raise _Retry("the file has changed since the last attempt")
        if status == 429 or status >= 500:
            raise _Retry(f"HTTP {status} {response.reason}", after=_seconds(headers.get("Retry-After")))
        if status not in (200, 206):
            raise _GiveUp(f"HTTP {status} {response.reason}")
        if headers.get("Content-Type", "").partition(";")[0].strip().lower() in ("text/html", "application/xhtml+xml"):
            raise _GiveUp("serves a web page, not an archive (a sign-in, consent or error page)")
        if status == 206 and start != str(offset):
            self.partial.remove()
            raise _Retry(f"sent bytes from {start}, not from {offset} as asked")
        if status == 200:
            length = headers.get("Content-Length", "")
            total = length if length.isdigit() else None
            self.partial.restart(url, _validator(response))

        size, whole = (self.partial.size, int(total) if total and total.isdigit() else None)
        with self.partial.path.open("ab") as file:
            # read1 returns what has come, so that the time limit holds against a host that drips.
            while chunk := response.raw.read1(_CHUNK, decode_content=False):
                file.write(chunk)
                file.flush()  # what has arrived outlives a kill
                size += len(chunk)
                self.tell(size, whole)
                self._time_left()
        if whole is not None and size != whole:
            raise _Retry(f"the connection closed after {size:,} of {whole:,} bytes")

    def _verified(self, *, resumed: bool) -> str:
        digest = sha256_of(self.partial.path)
        if self.expected:
            if digest == self.expected:
                return digest
        elif self.partial.size and not is_html(self.partial.path):
            return digest
        web_page, empty = is_html(self.partial.path), not self.partial.size
        self.partial.remove()
        if resumed:
            raise _Retry("the resumed file is not the expected one, starting anew")
        if web_page:
            raise _GiveUp("serves a web page, not an archive (a sign-in, consent or error page)")
        if empty:
            raise _GiveUp("serves an empty file")
        raise _GiveUp(
            f"sha256 is {digest}, expected {self.expected}: the host serves another file, or it was altered on the way"
        )

    def _time_left(self) -> float:
        """Seconds until the time limit; raises SourceError when it has passed."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise SourceError(
                f"{self.name}: not here after {self.limits.time_limit:g} s ({self.partial.size:,} bytes arrived): "
                f"run again to go on from there, or {BY_HAND}"
            )
        return left


def checked_sha256(sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise SourceError(f"{sha256!r} is not a sha256: give its 64 hex digits, or null to accept any content")
    return sha256.lower()


def _url_key(url: str) -> str:
    """Names an address without keeping the credentials that it may hold."""
    return hashlib.sha256(url.encode()).hexdigest()


def _shown(url: str) -> str:
    """An address for a message: without user, password and query, which may hold secrets."""
    return re.sub(r"(?<=://)[^/]*@|[?#].*", "", url, flags=re.DOTALL)


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _validator(response: requests.Response) -> str | None:
    """What names this version of the file for If-Range: a strong ETag, else the date (RFC 9110, 13.1.5)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _seconds(retry_after: str | None) -> float:
    """A Retry-After header, which holds seconds or a date, in seconds from now; 0 where it is absent or nonsense."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after or "").timestamp() - time.time())
    except ValueError:
        return 0.0


def _root_cause(error: BaseException) -> str:
    """The innermost reason of a network error: requests and urllib3 wrap it several times over."""
    while True:
        inner = getattr(error, "reason", None) or error.__cause__ or error.__context__
        if not isinstance(inner, BaseException):
            break
        error = inner
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return " ".join(reason.split())


@contextmanager
def _progress(name: str, bar: bool | None) -> Iterator[Callable[[int, int | None], None]]:
    """Yields what is called with (bytes so far, bytes in all or None) and shows it on stderr."""
    if sys.stderr.isatty() if bar is None else bar:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as display:
            task = display.add_task(name, total=None)
            yield lambda size, whole: display.update(task, completed=size, total=whole)
        return

    tenth, said = 0, time.monotonic()

    def tell(size: int, whole: int | None) -> None:
        nonlocal tenth, said
        now = 10 * size // whole if whole else 0
        if now > tenth or time.monotonic() - said > 10:
            tenth, said = now, time.monotonic()
            share = f" of {whole / 1e6:.1f} MB ({10 * now} %)" if whole else " MB"
            print(f"{name}: {size / 1e6:.1f}{share}", file=sys.stderr, flush=True)

    yield tell
