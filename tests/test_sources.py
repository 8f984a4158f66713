"""Downloads from a misbehaving host, and adopted files and folders."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.common.files import sha256_of
from src.configuration.schema import Official
from src.data.fetching.adopting import adopt
from src.data.fetching.archives import read_archive
from src.data.fetching.download import Limits, fetch
from src.data.fetching.files import SourceError
from src.data.fetching.official import fetch_official
from tests.loopback import Host

DATA = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
SHA = hashlib.sha256(DATA).hexdigest()
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,0.0.0.0")


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


class Fetcher:
    """Calls `fetch` with short timeouts, always to the same destination."""

    def __init__(self, folder: Path) -> None:
        self.destination = folder / "raw" / "data.tar.gz"
        self.partials = folder / "archives"

    def __call__(self, *urls: str, sha256: str | None = SHA, **options: Any) -> str:
        timeouts: dict[str, Any] = {"backoff": 0.01, "stall_timeout": 0.3, "connect_timeout": 2, "total": 20}
        limits = Limits(**timeouts | options)
        return fetch(urls, self.destination, sha256=sha256, partial_dir=self.partials, limits=limits)

    def refused(self, *urls: str, **options: Any) -> str:
        """The message of a fetch that must fail and leave no file at the destination."""
        with pytest.raises(SourceError) as error:
            self(*urls, **options)
        assert not self.destination.exists()
        assert not list(self.destination.parent.glob("*"))
        assert "\n" not in str(error.value)
        return str(error.value)

    @property
    def partial(self) -> Path:
        return self.partials / f"{SHA}.partial"


@pytest.fixture
def get(tmp_path: Path) -> Fetcher:
    return Fetcher(tmp_path)


def ranges(host: Host) -> list[str | None]:
    return [request.headers.get("Range") for request in host.requests]


# --- fetching ---------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_and_no_other_file_left(host: Host, get: Fetcher) -> None:
    assert get(host.serve("/a", DATA)) == SHA
    assert get.destination.read_bytes() == DATA
    assert list(get.destination.parent.iterdir()) == [get.destination]
    assert host.requests[0].headers["Accept-Encoding"] == "identity"  # the sha256 is of the file itself
    assert not list(get.partials.glob("*.partial")) and not list(get.partials.glob("*.origin"))


def test_a_correct_destination_is_not_fetched_again(host: Host, get: Fetcher) -> None:
    url = host.serve("/a", DATA)
    get(url)
    assert get(url) == SHA
    assert len(host.requests) == 1


def test_a_wrong_destination_is_replaced(host: Host, get: Fetcher) -> None:
    get.destination.parent.mkdir()
    get.destination.write_bytes(OTHER)
    get(host.serve("/a", DATA))
    assert get.destination.read_bytes() == DATA


@pytest.mark.parametrize("version", [{"etag": '"v1"'}, {"last_modified": "Mon, 01 Jan 2024 00:00:00 GMT"}])
def test_a_dropped_connection_is_resumed_with_if_range(host: Host, get: Fetcher, version: dict[str, str]) -> None:
    assert get(host.serve("/a", DATA, drop_after=100_000, **version)) == SHA  # type: ignore[arg-type]
    assert ranges(host) == [None, "bytes=100000-"]
    assert host.requests[1].headers.get("If-Range") == next(iter(version.values()))


def test_the_next_mirror_resumes_the_partial_file(host: Host, get: Fetcher) -> None:
    first = host.serve("/first", DATA, drop_after=100_000, etag='"theirs"')
    second = host.serve("/second", DATA, etag='"ours"')
    assert get(first, second, attempts=1) == SHA
    assert host.requests[1].headers["Range"] == "bytes=100000-"
    assert "If-Range" not in host.requests[1].headers  # the ETag is the first mirror's


def test_progress_resets_the_count_of_attempts(host: Host, get: Fetcher) -> None:
    assert get(host.serve("/a", DATA, drop_after=50_000, drops=5), attempts=2) == SHA
    assert len(host.requests) == 6


def test_a_host_that_ignores_range_restarts_the_download(host: Host, get: Fetcher) -> None:
    assert get(host.serve("/a", DATA, drop_after=100_000, ranges=False)) == SHA
    assert ranges(host) == [None, "bytes=100000-"]


def test_a_file_that_has_changed_restarts_the_download(host: Host, get: Fetcher) -> None:
    url = host.serve("/a", OTHER, drop_after=100_000, etag='"old"')
    get.refused(url, sha256=None, attempts=1)
    host.serve("/a", DATA, etag='"new"')
    assert get(url, sha256=None) == SHA
    assert host.requests[1].headers["If-Range"] == '"old"'


def test_without_sha256_and_version_no_download_is_resumed(host: Host, get: Fetcher) -> None:
    assert get(host.serve("/a", DATA, drop_after=100_000, etag='W/"weak"'), sha256=None) == SHA
    assert ranges(host) == [None, None]


def test_a_resumed_file_of_mixed_versions_is_fetched_again(host: Host, get: Fetcher) -> None:
    get.partials.mkdir()
    get.partial.write_bytes(OTHER[:100_000])
    assert get(host.serve("/a", DATA)) == SHA
    assert ranges(host) == ["bytes=100000-", None]


def test_a_range_with_a_wrong_offset_is_not_appended(host: Host, get: Fetcher) -> None:
    assert get(host.serve("/a", DATA, drop_after=100_000, shift=7)) == SHA
    assert ranges(host) == [None, "bytes=100000-", None]


def test_short_ranges_are_continued(host: Host, get: Fetcher) -> None:
    assert get(host.serve("/a", DATA, drop_after=100_000, portion=150_000)) == SHA
    assert ranges(host) == [None, "bytes=100000-", "bytes=250000-"]


def test_a_partial_longer_than_the_file_is_discarded(host: Host, get: Fetcher) -> None:
    get.partials.mkdir()
    get.partial.write_bytes(DATA + b"more")
    assert get(host.serve("/a", DATA)) == SHA
    assert ranges(host) == ["bytes=300004-", None]


def test_416_on_a_complete_partial_completes_it(host: Host, get: Fetcher) -> None:
    url = host.serve("/a", DATA, etag='"v1"', drop_after=100_000)
    get.refused(url, sha256=None, attempts=1)
    (partial,) = get.partials.glob("*.partial")
    partial.write_bytes(DATA)
    assert get(url, sha256=None) == SHA
    assert ranges(host) == [None, "bytes=300000-"]


def test_a_complete_partial_needs_no_network(get: Fetcher) -> None:
    get.partials.mkdir()
    get.partial.write_bytes(DATA)
    assert get("https://host.invalid/a") == SHA


def test_retry_after_is_honoured(host: Host, get: Fetcher) -> None:
    start = time.monotonic()
    assert get(host.serve("/a", DATA, failures=[429], retry_after="1")) == SHA
    assert time.monotonic() - start > 1


def test_the_time_limit_bounds_retry_after(host: Host, get: Fetcher) -> None:
    start = time.monotonic()
    url = host.serve("/a", DATA, failures=[503] * 9, retry_after="Fri, 31 Dec 2100 23:59:59 GMT")
    assert "after 0.4 s" in get.refused(url, total=0.4)
    assert time.monotonic() - start < 5


def test_a_mirror_with_another_file_is_skipped(host: Host, get: Fetcher) -> None:
    assert get(host.serve("/other", OTHER), host.serve("/a", DATA)) == SHA


def test_all_failed_mirrors_are_named_with_their_reasons(host: Host, get: Fetcher) -> None:
    message = get.refused(host.url + "/missing", host.serve("/other", OTHER))
    assert f"{host.url}/missing: HTTP 404" in message and f"{host.url}/other: sha256 is" in message


def test_a_web_page_keeps_the_partial_file(host: Host, get: Fetcher) -> None:
    get.partials.mkdir()
    get.partial.write_bytes(DATA[:100_000])
    get.refused(host.serve("/a", b"<html>Sign in</html>", content_type="text/html", ranges=False))
    assert get.partial.read_bytes() == DATA[:100_000]


def test_a_dripping_host_is_stopped_by_the_time_limit(host: Host, get: Fetcher) -> None:
    start = time.monotonic()
    message = get.refused(host.serve("/a", DATA, drip=0.02), total=0.5)
    assert "after 0.5 s" in message and "run again" in message
    assert time.monotonic() - start < 3
    assert DATA.startswith(get.partial.read_bytes())
    assert f"({get.partial.stat().st_size} bytes arrived)" in message and "(0 bytes" not in message


def test_an_unreachable_host_is_refused_with_the_remedy(get: Fetcher) -> None:
    with Host() as closed:
        url = closed.url + "/a"
    message = get.refused(url, attempts=2)
    assert "Connection refused" in message and url in message and "data.archive=PATH" in message


def test_circular_redirects_are_refused(host: Host, get: Fetcher) -> None:
    assert "redirects more than" in get.refused(host.serve("/a", redirect="/a"))


def test_addresses_other_than_https_are_refused_without_sha256(host: Host, get: Fetcher) -> None:
    for url in ("http://example.org/a", host.serve("/away", redirect="http://example.org/a"), "ftp://127.0.0.1/a"):
        assert "is not an https address" in get.refused(url, sha256=None)


def test_plain_http_is_accepted_with_sha256(host: Host, get: Fetcher) -> None:
    url = host.serve("/a", DATA).replace("127.0.0.1", "0.0.0.0")  # this machine, under an address other than loopback
    assert "plain http needs a sha256" in get.refused(url, sha256=None)
    assert get(url) == SHA


def test_https_is_verified_and_must_not_redirect_to_http(
    host: Host, get: Fetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "certificate.pem"
    with Host(certificate) as secure:
        plain = host.serve("/a", DATA)
        assert "CERTIFICATE_VERIFY_FAILED" in get.refused(secure.serve("/b", DATA), attempts=1).upper()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert "redirects from https" in get.refused(secure.serve("/a", redirect=plain))
        assert not host.requests
        assert get(secure.serve("/b", DATA), sha256=None) == SHA


def test_an_invalid_address_is_refused(get: Fetcher) -> None:
    assert "https://[" in get.refused("https://[")


def test_credentials_in_an_address_are_not_printed(host: Host, get: Fetcher) -> None:
    message = get.refused(host.url.replace("://", "://user:secret@") + "/missing?token=hidden")
    assert "secret" not in message and "hidden" not in message and "/missing" in message


def test_simultaneous_fetches_send_one_request(host: Host, get: Fetcher) -> None:
    url = host.serve("/a", DATA)
    threads = [threading.Thread(target=get, args=(url,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sha256_of(get.destination) == SHA
    assert len(host.requests) == 1


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_the_partial_may_be_on_another_file_system(host: Host, get: Fetcher) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if os.stat(folder).st_dev == os.stat(get.partials.parent).st_dev:
            pytest.skip("one file system only")
        get.partials = Path(folder)
        assert get(host.serve("/a", DATA)) == SHA
        assert list(get.destination.parent.iterdir()) == [get.destination]
        assert not get.partial.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_refused_with_the_remedy(host: Host, get: Fetcher) -> None:
    get.partials.mkdir()
    get.partial.symlink_to("/dev/full")
    message = get.refused(host.serve("/a", DATA))
    assert "no room to write" in message and str(get.partial) in message and "data.archive=PATH" in message


@pytest.mark.parametrize("source", ["file", "folder"])
def test_adopting_on_a_full_disk_is_refused_and_leaves_no_file(tmp_path: Path, source: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data").write_bytes(DATA)
    archive = {"file": str(tmp_path / "mine/data"), "folder": str(tmp_path / "mine")}
    program = (
        "import resource, sys; from pathlib import Path; from src.data.fetching.adopting import adopt\n"
        "from src.data.fetching.files import SourceError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "archive, folder = sys.argv[1], Path(sys.argv[2])\n"
        "try: adopt(archive, folder / 'raw' / 'data', sha256=None, partial_dir=folder / 'archives')\n"
        "except SourceError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, archive[source], str(tmp_path)]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("no room to write"), done.stderr
    assert not list(tmp_path.glob("raw/*")) and not list(tmp_path.glob("raw/.*"))


def test_a_folder_that_cannot_be_created_is_named(host: Host, get: Fetcher) -> None:
    get.partials.write_bytes(b"a file where the folder should be")
    assert str(get.partials) in get.refused(host.serve("/a", DATA))


def test_without_a_terminal_progress_is_printed_as_lines(
    host: Host, get: Fetcher, capsys: pytest.CaptureFixture[str]
) -> None:
    get(host.serve("/a", DATA))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "data.tar.gz: 0.3 of 0.3 MB (100 %)"
    assert 1 <= len(lines) <= 10


# --- adopting ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def adopt_archive(tmp_path: Path) -> Callable[..., str]:
    def adopt_archive(archive: str | Path, sha256: str | None = None) -> str:
        return adopt(str(archive), tmp_path / "raw" / "data", sha256=sha256, partial_dir=tmp_path / "archives")

    return adopt_archive


def write(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_the_destination_itself_is_kept(tmp_path: Path, adopt_archive: Callable[..., str]) -> None:
    write(tmp_path, raw__data=DATA)
    assert adopt_archive(tmp_path / "raw/data", SHA) == SHA
    assert (tmp_path / "raw/data").read_bytes() == DATA


def test_a_missing_archive_is_named_with_the_working_directory(
    tmp_path: Path, adopt_archive: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as error:
        adopt_archive("nowhere/data.zip")
    assert f"{tmp_path}/nowhere/data.zip" in str(error.value) and f"working directory {tmp_path}" in str(error.value)
    assert not (tmp_path / "raw").exists()


def test_a_folder_becomes_a_tar_of_its_name(tmp_path: Path, adopt_archive: Callable[..., str]) -> None:
    long = "n" * 150  # more than the 100 characters of a plain header
    folder = write(tmp_path / "photos", b__2=b"two", a__1=b"one", empty=b"", **{long: b"long"}, a__ä=b"umlaut")
    write(folder, **{".DS_Store": b"junk"})
    assert adopt_archive(folder) == sha256_of(tmp_path / "raw/data")
    assert list(read_archive(tmp_path / "raw/data")) == [
        ("photos/a/1", b"one"),
        ("photos/a/ä", b"umlaut"),
        ("photos/b/2", b"two"),
        ("photos/empty", b""),
        (f"photos/{long}", b"long"),
    ]


def test_the_tar_depends_on_names_and_contents_only(tmp_path: Path, adopt_archive: Callable[..., str]) -> None:
    first = write(tmp_path / "one" / "photos", a=b"1", b__c=b"2")
    second = write(tmp_path / "two" / "photos", b__c=b"2", a=b"1")
    os.utime(second / "a", (1, 1))
    (second / "a").chmod(0o700)
    digest = adopt_archive(first)
    assert adopt_archive(second, digest) == digest
    write(second, a=b"!")
    assert adopt_archive(second) != digest


def test_links_in_a_folder_are_followed(tmp_path: Path, adopt_archive: Callable[..., str]) -> None:
    """DVC's symlink cache makes every file a link to a place outside."""
    expected = adopt_archive(write(tmp_path / "one" / "photos", a=b"1", b__c=b"2", d__c=b"2"))
    folder = write(tmp_path / "two" / "photos", b__c=b"2")
    cached = write(tmp_path / "cache", x=b"1")
    (folder / "a").symlink_to(cached / "x")
    (folder / "d").symlink_to(folder / "b")
    assert adopt_archive(folder, expected) == expected


@pytest.mark.parametrize(
    ("target", "message"), [("b", "leads back to a folder above it"), ("nowhere", "is a link that leads to no file")]
)
def test_a_link_that_leads_nowhere_or_back_is_refused_by_name(
    target: str, message: str, tmp_path: Path, adopt_archive: Callable[..., str]
) -> None:
    folder = write(tmp_path / "photos", a=b"1", b__c=b"2")
    (folder / "b" / "link").symlink_to(folder / target)
    with pytest.raises(SourceError, match=rf"photos/b/link {message}"):
        adopt_archive(folder)
    assert not (tmp_path / "raw").exists()


def test_an_empty_folder_is_kept(tmp_path: Path, adopt_archive: Callable[..., str]) -> None:
    folder = write(tmp_path / "photos", a=b"1")
    without = adopt_archive(folder)
    (folder / "empty").mkdir()
    assert adopt_archive(folder) != without


def test_a_special_file_in_a_folder_is_refused_by_name(tmp_path: Path, adopt_archive: Callable[..., str]) -> None:
    folder = write(tmp_path / "photos", a=b"1")
    os.mkfifo(folder / "pipe")
    with pytest.raises(SourceError, match="photos/pipe is a special file"):
        adopt_archive(folder)


def test_a_folder_that_holds_the_destination_is_refused(tmp_path: Path, adopt_archive: Callable[..., str]) -> None:
    write(tmp_path, a=b"1")
    with pytest.raises(SourceError, match="name another folder"):
        adopt_archive(tmp_path)


def test_a_device_is_no_archive(adopt_archive: Callable[..., str]) -> None:
    with pytest.raises(SourceError, match="neither a file nor a folder"):
        adopt_archive("/dev/null")


def test_files_of_another_data_set_stay_out_of_the_archive(host: Host, tmp_path: Path) -> None:
    host.serve("/a/one", DATA)
    host.serve("/b/two", OTHER)
    unfinished = Official(urls=[host.url + "/a"], files={"one": SHA, "missing": "0" * 64})
    complete = Official(urls=[host.url + "/b"], files={"two": hashlib.sha256(OTHER).hexdigest()})
    archive = tmp_path / "raw" / "mnist.tar"
    with pytest.raises(SourceError, match="missing"):
        fetch_official(unfinished, archive, tmp_path / "archives")
    fetch_official(complete, archive, tmp_path / "archives")
    assert list(read_archive(archive)) == [("mnist/two", OTHER)]


def test_importing_the_module_is_light() -> None:
    program = (
        "import sys, src.data.fetching.download; print([m for m in ('torch', 'requests', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
