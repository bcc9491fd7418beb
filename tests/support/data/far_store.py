"""An S3 server on loopback that is as far away, and as unreliable, as it is told to be.

moto serves; a proxy in front of it adds a delay to each request and spoils some of them.
"""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "images"
Spoil = Callable[[str, str, int], str]
"""From method, path and number of a request: "" to serve it, `500` or `403`, `cut` after half of
the body, or `slow`, a second late."""


class FarStore:
    """`with FarStore() as store`: a bucket for this process and the processes that it starts."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.spoil: Spoil = lambda method, path, number: ""
        self.requests: list[tuple[str, str]] = []
        """Method and path of each, in order."""
        self.spoiled: list[str] = []

    def __enter__(self) -> FarStore:
        import boto3
        from moto.server import ThreadedMotoServer

        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        host, self._port = self._moto.get_host_and_port()
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        own = _environment(here)
        self._before = {name: os.environ.get(name) for name in own}
        os.environ.update(own)
        self._client: Any = boto3.client("s3", endpoint_url=f"http://{host}:{self._port}")
        self._client.create_bucket(Bucket=BUCKET)
        return self

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

    def put(self, key: str, data: bytes) -> str:
        """Stores an object, at once and whatever is spoiled. Returns its URL."""
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)
        return f"s3://{BUCKET}/{key}"

    def put_folder(self, folder: Path, prefix: str) -> str:
        """Stores the files of a folder below a prefix. Returns its URL."""
        for path in sorted(folder.iterdir()):
            self.put(f"{prefix}/{path.name}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def answer(self, asked: BaseHTTPRequestHandler) -> None:
        """Forwards one request."""
        number = len(self.requests)
        self.requests.append((asked.command, asked.path))
        how = self.spoil(asked.command, asked.path, number)
        if how:
            self.spoiled.append(how)
        time.sleep(self.delay_s + (how == "slow"))
        if how in ("500", "403"):
            asked.send_response(int(how))
            asked.send_header("Content-Length", "0")
            asked.end_headers()
            return
        there = http.client.HTTPConnection("127.0.0.1", self._port)
        there.request(asked.command, asked.path, headers=dict(asked.headers))
        found = there.getresponse()
        body = found.read()
        asked.send_response(found.status)
        for name, value in found.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                asked.send_header(name, value)
        asked.end_headers()
        asked.wfile.write(body[: len(body) // 2] if how == "cut" else body)
        if how == "cut":
            asked.close_connection = True
        there.close()


def _handler(store: FarStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            store.answer(self)

        def do_HEAD(self) -> None:
            store.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _environment(endpoint: str) -> dict[str, str]:
    key = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "key"}
    return {**key, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint}
