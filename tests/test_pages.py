"""The pages for readers: every link leads somewhere, and no page or line is too long."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *DOCS,
    *sorted((ROOT / "docs" / "experiments").glob("*.md")),
]
MOST_WORDS = 7_000
MOST_LINES = 149
MOST_LINES_OF_README = 119
MOST_CHARACTERS = 119


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings: small letters, words joined by hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), re.M)
    plain = [re.sub(r"\[(.+?)\]\(.+?\)", r"\1", heading).lower().strip() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def links(text: str) -> list[str]:
    """Targets inside of the repository."""
    prose = re.sub(r"`[^`\n]*`", "", without_code(text))
    targets = [target.strip() for target in re.findall(r"\]\(([^)]+)\)", prose)]
    return [target for target in targets if not re.match(r"https?:|mailto:", target)]


def broken(page: Path) -> list[str]:
    wrong = []
    for link in links(page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    return wrong


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `two`: three\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-two-three) [c](https://host/x) `[d](no)`\n"
        "[e](gone.md) [f](other.md#two) [g](#here) [h](other.md#no-heading)\n"
        "## There\n[i](#there)\n"
    )
    assert broken(page) == ["gone.md", "other.md#two", "#here", "other.md#no-heading"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_anchor_of_a_page_exists(page: Path) -> None:
    assert not broken(page)


def test_the_readme_leads_to_every_page_of_docs() -> None:
    seen, pending = set[Path](), [ROOT / "README.md"]
    while pending:
        page = pending.pop()
        seen.add(page)
        names = [link.partition("#")[0] for link in links(page.read_text())]
        targets = {(page.parent / name).resolve() for name in names if name.endswith(".md")}
        pending += targets - seen
    assert set(PAGES) <= seen


def test_pages_that_the_code_names_exist() -> None:
    files = [
        file
        for folder in ("fastmoco", "kernels", "bench", "tests", "configs")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in {".py", ".yaml", ".cpp", ".h", ".sh"}
    ]
    page = re.compile(r"\bdocs/[\w/]+\.(?:md|png|svg)\b")
    named = {name for file in files for name in page.findall(file.read_text())}
    assert len(named) > 3
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_a_page_is_short(page: Path) -> None:
    most = MOST_LINES_OF_README if page.name == "README.md" else MOST_LINES
    assert len(page.read_text().splitlines()) <= most


@pytest.mark.parametrize("page", PAGES[: 2 + len(DOCS)], ids=lambda page: page.name)
def test_lines_of_prose_fit_on_a_screen(page: Path) -> None:
    prose = [line for line in without_code(page.read_text()).splitlines() if line[:1] != "|"]
    assert [line for line in prose if len(line) > MOST_CHARACTERS] == []


def test_all_pages_together_stay_short() -> None:
    """Without the tables that `bench/pages` makes of rows. Signs alone are no words."""
    pages = [re.sub(r"<!-- bench:.+?<!-- /bench", "", p.read_text(), flags=re.S) for p in DOCS]
    words = [word for page in pages for word in page.split() if re.search(r"\w", word)]
    assert len(words) <= MOST_WORDS
