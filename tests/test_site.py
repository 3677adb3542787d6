"""The site is whole: every page is in it, every link leads somewhere, nothing is fetched from elsewhere, and its
reference has all that there is. Built as `make docs` builds it."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from chromium import CHROMIUM, REASON, browser
from test_docs import ROOT, VERBS

import batch_rerank
from batch_rerank.config import JobConfig
from batch_rerank.schema import OUTPUT_NAMES

SOURCES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]

SEARCH = """new Promise(found => {
  const field = document.querySelector("[data-md-component=search-query]")
  document.querySelector("#__search").click()
  field.focus()
  field.value = "lease_seconds"
  const look = setInterval(() => {
    field.dispatchEvent(new Event("keyup", {bubbles: true}))
    const links = [...document.querySelectorAll(".md-search-result__link")].map(link => link.href)
    if (links.length) { clearInterval(look); found(links.join(" ")) }
  }, 100)
})"""
"""Waits for what the site's search finds."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (the extra docs)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", ".ci/mkdocs.yml", "-d", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Page(HTMLParser):
    """Of a built page: where its links lead, what it loads, and what can be linked to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a":
            self.links += [given["href"]] * ("href" in given)
        else:
            self.loads += [given[name] for name in ("href", "src", "data", "action") if name in given]


read = cache(Page)


def missing(page: Path, link: str) -> bool:
    """Whether a link leads nowhere: no such file, or nothing in it that can be linked to."""
    parts = urlsplit(link)
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_file():
        return True
    return bool(parts.fragment) and unquote(parts.fragment) not in read(target).ids


def pages(site: Path) -> Iterator[Path]:
    return (page for page in site.glob("**/*.html") if page.name != "404.html")  # its links are of the root


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    found = {page: read(page) for page in pages(site)}
    inner = {
        (page, link)
        for page, content in found.items()
        for link in (*content.links, *content.loads)
        if not urlsplit(link).scheme
    }
    assert len(inner) > 300
    assert [f"{page.relative_to(site)}: {link}" for page, link in sorted(inner) if missing(page, link)] == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    loads = {link for page in site.glob("**/*.html") for link in read(page).loads}
    assert len(loads) > 20
    assert {link for link in loads if urlsplit(link).scheme not in ("", "data") or link.startswith("//")} == set()
    for sheet in site.glob("**/*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_every_page_of_docs_is_in_the_navigation(site: Path) -> None:
    first = read(site / "index.html").links
    for source in (ROOT / "docs").glob("**/*.md"):
        assert source.relative_to(ROOT / "docs").with_suffix(".html").as_posix() in first, source


def test_the_reference_has_every_verb_key_and_column(site: Path) -> None:
    def text(name: str) -> str:
        return re.sub(r"<[^>]+>", "", (site / f"reference/{name}.html").read_text(encoding="utf-8"))

    verbs, keys, columns, python = map(text, ("command-line", "job-file", "output", "python"))
    assert all(f"$ batch-rerank {verb} " in verbs for verb in VERBS)
    assert "--despite-gate" in verbs
    for section, values in JobConfig.model_json_schema()["$defs"].items():
        assert all(f"\n{key}\n" in keys for key in values["properties"]), section
    assert all(name in columns for name in OUTPUT_NAMES)
    assert all(name in python for name in batch_rerank._HOMES)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_what_the_sources_link_to_exists(source: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", source.read_text(encoding="utf-8")):
        path = urlsplit(target).path
        if not urlsplit(target).scheme and path:
            assert (source.parent / path).exists(), f"{source.name}: {target}"


@pytest.mark.skipif(CHROMIUM is None, reason=REASON)
def test_a_browser_opens_it_from_a_folder(site: Path, tmp_path: Path) -> None:
    async def look() -> None:
        async with browser(tmp_path) as page:
            for width in (390, 1280):
                await page.size(width)
                for name in ("index", "tuning", "reference/job-file"):
                    await page.open(f"{(site / name).as_uri()}.html")
                    wide = await page.value("document.documentElement.scrollWidth")
                    assert wide <= width, f"{name} at {width}: {wide}"
            given = {"expression": SEARCH, "awaitPromise": True, "returnByValue": True}
            found = await asyncio.wait_for(page.ask("Runtime.evaluate", **given), 60)
            assert "reference/job-file.html" in found["result"]["value"]
        assert {url for url in page.requests if not url.startswith(("file:", "data:", "about:"))} == set()
        assert page.complaints == []

    asyncio.run(look())
