"""An HTTP proxy on loopback that stands before an object store and fails some of the requests, as a busy one does."""

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
FAULTS = ("503", "reset before", "reset behind", "dawdle")


class FaultProxy(ThreadingHTTPServer):
    """Forwards to `target`; `share` of the requests get a fault, drawn from the seed.

    `503`: an answer that asks to slow down. `reset before`, `reset behind`: the connection is reset before the store
    has seen the request, or behind it, when it was done and its answer is lost. `dawdle`: an answer that is late.
    `only`: a method and a part of the path that a request must have to be given a fault.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        target: tuple[str, int],
        share: float,
        seed: int = 0,
        faults: tuple[str, ...] = FAULTS,
        only: tuple[str, str] = ("", ""),
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.share = share
        self.requests: Counter[str] = Counter()
        self._faults, self._only = faults, only
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self, method: str, path: str) -> str:
        """The fault of the next request, or ""."""
        with self._lock:
            wanted = self._only[0] in method and self._only[1] in path
            fault = self._random.choice(self._faults) if wanted and self._random.random() < self.share else ""
            self.requests[fault] += 1
            return fault

    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle is nothing to print about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.draw(self.command, self.path)
        if fault == "reset before":
            return self._reset()
        if fault == "503":
            return self._answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        if fault == "dawdle":
            time.sleep(0.5)
        connection = http.client.HTTPConnection(*self.server.target)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "reset behind":
            return self._reset()
        return self._answer(answer.status, answer.getheaders(), data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = dict(headers).get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def faulty(target: tuple[str, int], share: float, **settings: object) -> Iterator[FaultProxy]:
    """A proxy before `target` for the length of the block."""
    with FaultProxy(target, share, **settings) as proxy:  # type: ignore[arg-type]
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield proxy
        proxy.shutdown()
