"""Downloads by the real commands from a host that misbehaves: exit code, the one line, what is left, what goes on."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from src.common.files import sha256_of
from tests.conftest import Run, commands_environment
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
    """Nothing of the full profile was there before, nor stays."""
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
    """What has arrived of unfinished downloads."""
    return sorted((clone / "data" / ".partial").glob("*.partial"))


def ranges(host: Host) -> list[str | None]:
    return [request.headers.get("Range") for request in host.requests]


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line with which the download failed; beside it, stderr shows progress alone."""
    assert done.returncode == 1, done
    (line,) = [line for line in done.stderr.splitlines() if not PROGRESS.fullmatch(line)]
    assert line.startswith("download failed: ")
    return line


def start(clone: Path, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "src.download", *WORDS, f"data.archive={url}"],
        cwd=clone,
        env=commands_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # as in a terminal: what a script starts in the background ignores Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("version", ["etag", "sha256"])
def test_a_download_that_drops_again_and_again_goes_on_where_it_broke(
    version: str, host: Host, clone: Path, run: Run
) -> None:
    etag = '"v1"' if version == "etag" else None
    known = [f"data.sha256={SHA}"] if version == "sha256" else []
    url = host.serve("/c.tar.gz", DATA, drop_after=100_000, drops=2, etag=etag)
    done = run("python", "-m", "src.download", *WORDS, f"data.archive={url}", *known)
    assert ranges(host) == [None, "bytes=100000-", "bytes=200000-"]
    assert done.stdout.count("trying again in 1 s") == 2
    assert f"from c.tar.gz, sha256 {SHA}" in done.stdout
    assert raw_files(clone) == ["cifar-10-binary.tar.gz", "source.json"]
    assert partials(clone) == []


@pytest.mark.parametrize(
    ("resource", "words", "told"),
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
    ids=["wrong-hash", "500s", "404", "html", "html-as-gzip", "empty", "drops-at-once", "leads-away"],
)
def test_a_download_that_cannot_succeed_ends_with_one_line_and_leaves_nothing(
    resource: dict[str, Any], words: list[str], told: str, host: Host, clone: Path, run: Run
) -> None:
    url = host.serve("/c.tar.gz", **resource)
    line = only_line(run("python", "-m", "src.download", *WORDS, f"data.archive={url}", *words, check=False))
    assert f"cannot fetch cifar-10-binary.tar.gz: {url}: " in line
    assert told in line
    assert line.endswith("Try again, or fetch the file by hand and give data.archive=PATH")
    assert raw_files(clone) == []
    assert [path for path in partials(clone) if path.stat().st_size] == []


def test_the_next_mirror_serves_when_the_first_serves_a_web_page(host: Host, clone: Path, run: Run) -> None:
    mirrors = [host.serve("/a", WEB_PAGE, content_type="text/html"), host.serve("/b", DATA)]
    run("python", "-m", "src.download", *WORDS, f"data.official={{urls: [{','.join(mirrors)}], sha256: {SHA}}}")
    assert sha256_of(clone / "data/raw/full/cifar10/cifar-10-binary.tar.gz") == SHA


@pytest.mark.long
def test_a_host_that_hangs_is_left_after_half_a_minute_and_asked_again(host: Host, clone: Path) -> None:
    url = host.serve("/c.tar.gz", DATA, etag='"v1"', hang_after=100_000)
    process = start(clone, url)
    wait_until(lambda: [path.stat().st_size for path in partials(clone)] == [100_000])
    host.serve("/c.tar.gz", DATA, etag='"v1"')
    said, complained = process.communicate(timeout=120)
    assert process.returncode == 0, complained
    assert "trying again in 1 s" in said
    assert ranges(host) == [None, "bytes=100000-"]


@pytest.mark.long
def test_a_host_that_hangs_for_good_is_given_up_and_what_came_is_kept(host: Host, clone: Path, run: Run) -> None:
    url = host.serve("/c.tar.gz", DATA, etag='"v1"', hang_after=100_000, ranges=False)
    words = ("python", "-m", "src.download", *WORDS, f"data.archive={url}")
    line = only_line(run(*words, check=False))
    assert "timed out" in line and "(attempt 4 of 4)" in line
    assert raw_files(clone) == []
    host.serve("/c.tar.gz", DATA, etag='"v1"')
    run(*words)
    assert ranges(host)[-1] == "bytes=100000-"
    assert raw_files(clone) == ["cifar-10-binary.tar.gz", "source.json"]


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)])
def test_a_download_that_was_ended_goes_on_with_the_same_command(
    stop: signal.Signals, code: int, host: Host, clone: Path, run: Run
) -> None:
    url = host.serve("/c.tar.gz", DATA, etag='"v1"', hang_after=100_000)
    process = start(clone, url)
    wait_until(lambda: [path.stat().st_size for path in partials(clone)] == [100_000])
    process.send_signal(stop)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in complained
    assert raw_files(clone) == []
    host.serve("/c.tar.gz", DATA, etag='"v1"')
    run("python", "-m", "src.download", *WORDS, f"data.archive={url}")
    assert ranges(host) == [None, "bytes=100000-"]
    assert raw_files(clone) == ["cifar-10-binary.tar.gz", "source.json"]


# --- through a training -----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_archive_that_arrives_after_drops_is_trained_and_evaluated_on(
    host: Host, clone: Path, run: Run, tmp_path: Path
) -> None:
    archive = write_tar(tmp_path / "c.tar", cifar_members())
    url = host.serve("/c.tar", archive.read_bytes(), etag='"v1"', drop_after=40_000, drops=2)
    words = (*WORDS, *TINY, f"data.archive={url}")
    done = run("python", "-m", "src.train", *words)
    assert ranges(host) == [None, "bytes=40000-", "bytes=80000-"]
    assert "cifar10: train 38, val 2, test 6" in done.stdout
    found = re.search(r"trained in [\d.]+ s: (\S+)/train", done.stdout)
    assert found, done.stdout
    run("python", "-m", "src.evaluate", "-cp", f"../{found[1]}", "-cn", "config")
    assert json.loads((clone / found[1] / "metrics.json").read_text())["profile"] == "full"
    (source,) = [note for note in direct_sources(clone) if note["origin"] == "c.tar"]
    assert source["sha256"] == sha256_of(archive)

    run("python", "-m", "src.train", *words, "seed=1")
    assert len(host.requests) == 3  # the data was there


def test_a_training_whose_data_cannot_be_had_says_why_and_leaves_no_data(host: Host, clone: Path, run: Run) -> None:
    url = host.serve("/never.tar", OTHER)
    done = run("python", "-m", "src.train", *WORDS, *TINY, f"data.archive={url}", f"data.sha256={SHA}", check=False)
    assert done.returncode == 1
    download, train = [line for line in done.stderr.splitlines() if not PROGRESS.fullmatch(line)]
    assert download.startswith("download failed: cannot fetch cifar-10-binary.tar.gz: ") and OTHER_SHA in download
    assert train == "train failed: the data of cifar10 could not be prepared: download failed, see above"
    assert [note for note in direct_sources(clone) if note["origin"] == "never.tar"] == []
    assert not [path for path in clone.glob("data/direct/*/raw/full/*/*") if sha256_of(path) == OTHER_SHA]


def direct_sources(clone: Path) -> list[dict[str, Any]]:
    """Where the archives of direct runs came from."""
    return [json.loads(path.read_text()) for path in clone.glob("data/direct/*/raw/full/cifar10/source.json")]
