"""Downloads from a misbehaving host through the real commands: exit code, error line, remaining files, resume."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.common.files import sha256_of
from tests.conftest import Run, commands_environment
from tests.faults.commands import output_of
from tests.fork_server import start_command
from tests.loopback import Host
from tests.tiny_data import cifar_members, write_tar

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

DATA, OTHER = (random.Random(seed).randbytes(300_000) for seed in (0, 1))
SHA, OTHER_SHA = (hashlib.sha256(content).hexdigest() for content in (DATA, OTHER))
WEB_PAGE = b"\n<!DOCTYPE html><html>Sign in</html>"
PROGRESS = re.compile(r"\S+: [\d.]+( of [\d.]+)? MB( \(\d+ %\))?")
WORDS = ("+experiment=cifar10_resnet", "profile=full")
TINY = ("model.network.width=8", "trainer.max_epochs=1", "trainer.threads=1")


@pytest.fixture(autouse=True)
def clean(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Removes the downloads of the full profile before and after each test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folders = [clone / "data" / "raw" / "full", clone / "data" / ".partial"]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    yield
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def raw_files(clone: Path) -> list[str]:
    return sorted(path.name for path in (clone / "data" / "raw" / "full").rglob("*") if path.is_file())


def partials(clone: Path) -> list[Path]:
    """The partial files of unfinished downloads."""
    return sorted((clone / "data" / ".partial").glob("*.partial"))


def ranges(host: Host) -> list[str | None]:
    return [request.headers.get("Range") for request in host.requests]


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error line of a failed download; the other lines of stderr are progress."""
    assert done.returncode == 1, done
    (line,) = [line for line in done.stderr.splitlines() if not PROGRESS.fullmatch(line)]
    assert line.startswith("download failed: ")
    return line


def start(clone: Path, url: str) -> subprocess.Popen[str]:
    words = ("python", "-m", "src.download", *WORDS, f"data.archive={url}")
    return start_command(words, clone, commands_environment(), stderr=subprocess.PIPE)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@pytest.mark.parametrize("version", ["etag", "sha256"])
def test_a_download_resumes_after_each_dropped_connection(version: str, host: Host, clone: Path, run: Run) -> None:
    etag = '"v1"' if version == "etag" else None
    digest = [f"data.sha256={SHA}"] if version == "sha256" else []
    url = host.serve("/c.tar.gz", DATA, drop_after=100_000, drops=2, etag=etag)
    done = run("python", "-m", "src.download", *WORDS, f"data.archive={url}", *digest)
    assert ranges(host) == [None, "bytes=100000-", "bytes=200000-"]
    assert done.stdout.count("trying again in 1 s") == 2
    assert f"from c.tar.gz, sha256 {SHA}" in done.stdout
    assert raw_files(clone) == ["cifar-10-binary.tar.gz", "source.json"]
    assert partials(clone) == []


@pytest.mark.parametrize(
    ("resource", "words", "message"),
    [
        ({"data": OTHER}, [f"data.sha256={SHA}"], f"sha256 is {OTHER_SHA}, expected {SHA}: the host serves another"),
        ({"failures": [500] * 9}, [], "HTTP 500 Internal Server Error (attempt 4 of 4)"),
        ({"status": 404}, [], "HTTP 404 Not Found"),
        ({"data": WEB_PAGE, "content_type": "text/html"}, [], "serves a web page, not an archive"),
        ({"data": WEB_PAGE, "content_type": "application/gzip"}, [], "serves a web page, not an archive"),
        ({"data": b""}, [], "serves an empty file"),
        ({"data": DATA, "drop_after": 0, "drops": 9}, [], "(attempt 4 of 4)"),
        ({"redirect": "http://example.org/c.tar.gz"}, [], "http://example.org/c.tar.gz is not an https address"),
    ],
    ids=["wrong-hash", "500s", "404", "html", "html-as-gzip", "empty", "drops-immediately", "redirect-to-http"],
)
def test_a_failed_download_prints_one_line_and_leaves_no_file(
    resource: dict[str, Any], words: list[str], message: str, host: Host, clone: Path, run: Run
) -> None:
    url = host.serve("/c.tar.gz", **resource)
    line = error_line(run("python", "-m", "src.download", *WORDS, f"data.archive={url}", *words, check=False))
    assert f"cannot fetch cifar-10-binary.tar.gz: {url}: " in line
    assert message in line
    assert line.endswith("Try again, or fetch the file by hand and give data.archive=PATH")
    assert raw_files(clone) == []
    assert [path for path in partials(clone) if path.stat().st_size] == []


def test_a_mirror_that_serves_a_web_page_is_skipped(host: Host, clone: Path, run: Run) -> None:
    mirrors = [host.serve("/a", WEB_PAGE, content_type="text/html"), host.serve("/b", DATA)]
    run("python", "-m", "src.download", *WORDS, f"data.official={{urls: [{','.join(mirrors)}], sha256: {SHA}}}")
    assert sha256_of(clone / "data/raw/full/cifar10/cifar-10-binary.tar.gz") == SHA


@pytest.mark.long
def test_a_stalled_download_is_resumed_after_the_timeout(host: Host, clone: Path) -> None:
    url = host.serve("/c.tar.gz", DATA, etag='"v1"', hang_after=100_000)
    process = start(clone, url)
    wait_until(lambda: [path.stat().st_size for path in partials(clone)] == [100_000])
    host.serve("/c.tar.gz", DATA, etag='"v1"')
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert "trying again in 1 s" in stdout
    assert ranges(host) == [None, "bytes=100000-"]


@pytest.mark.long
def test_a_host_that_always_stalls_is_given_up_and_the_partial_file_kept(host: Host, clone: Path, run: Run) -> None:
    url = host.serve("/c.tar.gz", DATA, etag='"v1"', hang_after=100_000, ranges=False)
    words = ("python", "-m", "src.download", *WORDS, f"data.archive={url}")
    line = error_line(run(*words, check=False))
    assert "timed out" in line and "(attempt 4 of 4)" in line
    assert raw_files(clone) == []
    host.serve("/c.tar.gz", DATA, etag='"v1"')
    run(*words)
    assert ranges(host)[-1] == "bytes=100000-"
    assert raw_files(clone) == ["cifar-10-binary.tar.gz", "source.json"]


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_an_interrupted_download_is_resumed_by_the_same_command(
    stop: signal.Signals, code: int, host: Host, clone: Path, run: Run
) -> None:
    url = host.serve("/c.tar.gz", DATA, etag='"v1"', hang_after=100_000)
    process = start(clone, url)
    wait_until(lambda: [path.stat().st_size for path in partials(clone)] == [100_000])
    process.send_signal(stop)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert raw_files(clone) == []
    host.serve("/c.tar.gz", DATA, etag='"v1"')
    run("python", "-m", "src.download", *WORDS, f"data.archive={url}")
    assert ranges(host) == [None, "bytes=100000-"]
    assert raw_files(clone) == ["cifar-10-binary.tar.gz", "source.json"]


# --- through a training -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_training_and_evaluation_work_after_a_resumed_download(
    host: Host, clone: Path, run: Run, tmp_path: Path
) -> None:
    archive = write_tar(tmp_path / "c.tar", cifar_members())
    url = host.serve("/c.tar", archive.read_bytes(), etag='"v1"', drop_after=40_000, drops=2)
    words = (*WORDS, *TINY, f"data.archive={url}")
    done = run("python", "-m", "src.train", *words)
    assert ranges(host) == [None, "bytes=40000-", "bytes=80000-"]
    assert "cifar10: train 38, val 2, test 6" in done.stdout
    output = output_of(done.stdout)
    run("python", "-m", "src.evaluate", "-cp", f"../{output}", "-cn", "config")
    assert json.loads((clone / output / "metrics.json").read_text())["profile"] == "full"
    (source,) = [source for source in direct_sources(clone) if source["origin"] == "c.tar"]
    assert source["sha256"] == sha256_of(archive)

    run("python", "-m", "src.train", *words, "seed=1")
    assert len(host.requests) == 3  # the archive is not fetched again


def test_training_without_its_archive_is_refused_and_leaves_no_data(host: Host, clone: Path, run: Run) -> None:
    url = host.serve("/never.tar", OTHER)
    done = run("python", "-m", "src.train", *WORDS, *TINY, f"data.archive={url}", f"data.sha256={SHA}", check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not PROGRESS.fullmatch(line)]
    assert line.startswith("train failed: cannot fetch cifar-10-binary.tar.gz: ") and OTHER_SHA in line
    assert [source for source in direct_sources(clone) if source["origin"] == "never.tar"] == []
    assert not [path for path in clone.glob("data/direct/archives/*/raw/full/*/*") if sha256_of(path) == OTHER_SHA]


def direct_sources(clone: Path) -> list[dict[str, Any]]:
    """The source notes of the archives of direct runs."""
    return [json.loads(path.read_text()) for path in clone.glob("data/direct/archives/*/raw/full/cifar10/source.json")]
