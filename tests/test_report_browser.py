"""A report in a real browser: it asks for nothing, complains of nothing, fits any screen, and texts are texts."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, REASON, Page, browser
from conftest import candidate_rows, job, write

from batch_rerank.job.run import run
from batch_rerank.report.page import page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=REASON)

HOSTILE = (
    "<script>document.title='gone'</script>",
    "\u202eright to left\u202c",
    "\x1b[31mred\x07\x00",
    "</pre></style><img src=/evil.png onerror=\"document.title='gone'\">",
    "&lt;b&gt; \" ' `",
    "שלום عربي",
    "<svg onload=\"document.title='gone'\"><bdi>",
    "]]></title><link rel=stylesheet href=http://203.0.113.1/x.css>",
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output whose every id and text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = candidate_rows(16, 20)
    for number, row in enumerate(rows):
        query = int(row["query_id"][1:])
        row["query_id"] += HOSTILE[query % 8]
        row["query"] = HOSTILE[(query + 1) % 8] + row["query"]
        row["doc_id"] += HOSTILE[number % 8]
        row["text"] = HOSTILE[(number + 3) % 8] + row["text"] if number % 19 else None
    write(folder / "in/0.parquet", rows)
    config = job(folder / "in", folder / "out", output__report=True, scoring__max_failed_rows=0.2, model__max_length=64)
    run(config, local=True)
    return folder / "out"


@pytest.fixture
def served(output: Path) -> Iterator[tuple[str, list[str]]]:
    """The output's folder on a server, and what was asked of it."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(output / "_report"))

        def log_message(self, kind: str, *given: Any) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


SEEN = """[...document.querySelectorAll('figure svg[role=img], .lanes svg[role=img]')].map(one => {
  const box = one.getBoundingClientRect()
  const marks = [...one.querySelectorAll('rect, path')].filter(mark => mark.getBoundingClientRect().width > 0)
  return [one.querySelector('title').textContent, box.width, box.height, box.right, marks.length]
})"""

OUTSIDE = """[...document.querySelectorAll('main *')].filter(one => {
  const box = one.getBoundingClientRect()
  const inside = one.closest('.scroll')
  return box.width && box.right > innerWidth + 1 && !inside && !one.closest('pre') && !one.closest('svg')
}).map(one => one.outerHTML.slice(0, 200))"""


async def figures(opened: Page) -> list[list[Any]]:
    found: list[list[Any]] = await opened.value(SEEN)
    return found


def test_a_report_opens_alone_and_shows_texts_as_texts(
    output: Path, served: tuple[str, list[str]], tmp_path: Path
) -> None:
    url, asked = served

    async def look() -> None:
        async with browser(tmp_path / "profile") as opened:
            await opened.size(1100)
            await opened.open(f"{url}/report.html")
            assert asked == ["/report.html"]
            assert [one for one in opened.requests if not one.startswith("data:")] == [f"{url}/report.html"]
            assert opened.complaints == []
            assert await opened.value("document.title") == "Reranked: out"
            assert (
                await opened.value("document.querySelectorAll('script, img, iframe, link[rel=stylesheet]').length") == 0
            )
            assert await opened.value("document.querySelectorAll('[onload], [onerror], [style]').length") == 0
            text = await opened.value("document.querySelector('main').textContent")
            for shown in (
                HOSTILE[0],
                HOSTILE[3],
                HOSTILE[6],
                HOSTILE[7],
                "\\u202eright to left\\u202c",
                "\\x1b[31mred\\x07\\x00",
            ):
                assert shown in text, shown
            assert HOSTILE[5] in text
            assert not set("\u202e\u202c\x1b\x07\x00") & set(text)
            wide = await figures(opened)
            assert [one[0] for one in wide][:4] == [
                "Distribution of scores",
                "Distribution of relevance",
                "Places gained and lost against the first stage",
                "Of the top 10, how many were in the first stage's top 10",
            ]
            assert {"Tokens of a pair", "Pairs scored a second over time"} <= {one[0] for one in wide}
            await opened.size(380)
            narrow = await figures(opened)
            assert len(narrow) == len(wide) >= 8
            for name, width, height, right, marks in wide + narrow:
                assert width > 80 and height > 10 and marks, name
                assert right <= 1100, name
            assert all(right <= 380 for _, _, _, right, _ in narrow)
            assert await opened.value("document.documentElement.scrollWidth") <= 380
            assert await opened.value(OUTSIDE) == []
            colours = []
            for kind, scheme in (("screen", "light"), ("screen", "dark"), ("print", "dark")):
                await opened.media(kind, scheme)
                names = "getComputedStyle(document.body)"
                colours.append(await opened.value(f"[{names}.backgroundColor, {names}.color].join(' ')"))
            assert len(set(colours)) == 3 and "rgb(255, 255, 255)" in colours[2]
            assert opened.complaints == [] and asked == ["/report.html"]

    asyncio.run(look())


def test_the_browser_sees_what_is_alive_where_nothing_is_escaped(
    output: Path, served: tuple[str, list[str]], tmp_path: Path
) -> None:
    """The proof that the test above can fail: the same page without escapes and without its policy."""
    url, asked = served
    html = (output / "_report/report.html").read_text()
    broken = html.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&#x27;", "'")
    broken = broken.replace("http-equiv", "data-was")
    (output / "_report/broken.html").write_text(broken)

    async def look() -> None:
        async with browser(tmp_path / "profile") as opened:
            await opened.open(f"{url}/broken.html")
            assert await opened.value("document.title") == "gone"
            assert "/evil.png" in asked

    asyncio.run(look())
    (output / "_report/broken.html").unlink()


def test_the_page_is_made_of_its_numbers_alone_byte_for_byte(output: Path) -> None:
    data, html = ((output / f"_report/report.{kind}").read_bytes() for kind in ("json", "html"))
    assert page(data) == html
    other = json.loads(data)
    other["counts"]["rows_in"] += 1
    assert page(json.dumps(other).encode()) != html
