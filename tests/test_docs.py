"""README.md and docs/ against the repository: links, commands, and the two lock files that they name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def locked(name: str) -> set[str]:
    """The pinned versions of a lock file, with their markers."""
    pins = re.findall(r"(?m)^([\w.\-\[\]]+==[^\\\n]+)", (ROOT / name).read_text())
    return {pin.strip() for pin in pins}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_leads_to_a_file_and_a_heading_of_the_repository(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_exists(page: Path) -> None:
    text = page.read_text()
    for module in re.findall(r"python -m ((?:src|benchmarks|verification)(?:\.\w+)*)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    assert set(re.findall(r"(?m)(?:`|^)make ([a-z-]+)", text)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_option_of_a_configuration_group_exists(page: Path) -> None:
    own = {"birds"}  # the reader's own data set in docs/your-data.md
    for command in re.findall(r"(?m)^python -m src\.\w+ .*$", page.read_text()):
        for group, option in re.findall(r" \+?(experiment|model|data|trainer|profile|debug)=([a-z]\w*)", command):
            assert option in own or (ROOT / "conf" / group / f"{option}.yaml").is_file(), command


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_environment_for_testing_holds_the_one_for_running_at_the_same_versions() -> None:
    running = locked("requirements.lock")
    assert len(running) > 100
    assert running < locked("requirements-dev.lock")


def test_the_locks_name_no_package_index() -> None:
    for name in ("requirements.lock", "requirements-dev.lock"):
        assert not re.search(r"https?://|--index|--find-links|file:", (ROOT / name).read_text())
