"""Objects behind `https://`: what a server answers is told from what it does not have."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest

from fastmoco.config import ConfigError
from fastmoco.data.sources.remote import store
from fastmoco.data.sources.remote.store import Object, fetch, look, there

pytest.importorskip("aiohttp", reason="the extra remote is not installed")
DATA = bytes(range(256)) * 100
Answer = Callable[[str, int], int]


class Site:
    """Serves `DATA` as `/a.tar`; `answer` gives the status of the n-th request of a method."""

    def __init__(self) -> None:
        self.answer: Answer = lambda method, number: 200
        self.requests: Counter[str] = Counter()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._send("HEAD", b"")

            def do_GET(self) -> None:
                first, last = 0, len(DATA) - 1
                if wanted := self.headers.get("Range"):
                    first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
                self._send("GET", DATA[first : last + 1])

            def _send(self, method: str, data: bytes) -> None:
                site.requests[method] += 1
                status = site.answer(method, site.requests[method])
                if self.path != "/a.tar":
                    status = 404
                self.send_response(status)
                if status < 300:
                    self.send_header("Content-Length", str(len(data) or len(DATA)))
                    self.send_header("Accept-Ranges", "bytes")
                self.end_headers()
                if status < 300:
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/a.tar"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(store, "PAUSE_S", 0.001)
    served = Site()
    yield served
    served.server.shutdown()
    served.server.server_close()


def test_an_object_arrives_in_pieces(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PIECE", 1000)
    one, file = look(site.url), BytesIO()
    assert one == Object(site.url, len(DATA), "")
    fetch(one, file)
    assert file.getvalue() == DATA


@pytest.mark.parametrize("status", [500, 503, 429])
def test_an_answer_that_passes_is_waited_for(site: Site, status: int) -> None:
    """fsspec says FileNotFoundError to each of them."""
    site.answer = lambda method, number: status if number % 3 else 200
    file = BytesIO()
    fetch(look(site.url), file)
    assert file.getvalue() == DATA
    assert there(site.url) == look(site.url)


def test_what_is_not_there(site: Site) -> None:
    url = site.url.replace("a.tar", "b.tar")
    with pytest.raises(ConfigError, match=r"b\.tar does not exist"):
        look(url)
    assert there(url) is None


@pytest.mark.parametrize("status", [401, 403])
def test_what_may_not_be_read(site: Site, status: int) -> None:
    site.answer = lambda method, number: status
    with pytest.raises(ConfigError, match=rf"a\.tar may not be read: {status}"):
        look(site.url)
    assert there(site.url) is None  # a store says so of what is missing where nobody may list


class HttpError(Exception):
    """As that of gcsfs, which is not installed here."""

    code = 401


@pytest.mark.parametrize(
    "error", [OSError("Forbidden: https://x\nno list access."), HttpError("no list access")]
)
def test_what_google_forbids(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Files:
        def info(self, url: str) -> None:
            asked.append(url)
            raise error

    monkeypatch.setattr(store, "_of", lambda url: Files())
    assert there("gs://b/a.tar.fastmoco-index") is None
    with pytest.raises(ConfigError, match=r"^gs://b/a\.tar may not be read: .*no list access\.$"):
        look("gs://b/a.tar")
    assert len(asked) == 2  # once each


def test_a_server_that_is_gone_is_no_missing_object(site: Site) -> None:
    url = site.url.replace(site.url.split(":")[2].split("/")[0], "1")
    with pytest.raises(ConfigError, match=r"cannot be read, 8 times in a row \(.*onnect"):
        there(url)
