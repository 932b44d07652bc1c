"""A server on loopback that answers as it is told to, or passes on what a real server answers."""

import collections
import http.client
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

Fault = str | Callable[[dict[str, Any]], dict[str, Any]]


class FaultyProxy:
    """Counts what is asked, and fails as it is told to, once for each fault of a prompt.

    Args:
        upstream: 'host:port' of the server behind it; None where `answer` makes the answers.
        answer: makes an answer of a body.

    Attributes:
        faults: for a prompt (as JSON), what happens to it next: '429', '500', '401', '400',
            'reset' before the server is asked, 'lost' after it has answered, 'hang', 'truncated',
            or a function that alters the answer.
        asked: the bodies that came, in order, by their `Idempotency-Key`.
        answered: how often a whole answer was sent, by key; counted before anyone can have it.
        most_at_once: requests that had come and were not being answered yet.
        refused: set once a request has been refused with a status.
        passed: how often the server behind was asked, by key.
        keys: what came as Authorization.
        remembers: whether an answer is given again to the same key, as servers that know the header
            do; else each time is paid for.
        before_answer: called with the key before an answer leaves.
    """

    def __init__(
        self, upstream: str | None = None, answer: Callable[[dict], dict] | None = None
    ) -> None:
        self.faults: dict[str, list[Fault]] = collections.defaultdict(list)
        self.asked: dict[str, list[dict]] = collections.defaultdict(list)
        self.answered: collections.Counter[str] = collections.Counter()
        self.passed: collections.Counter[str] = collections.Counter()
        self.times: dict[str, list[float]] = collections.defaultdict(list)
        self.keys: set[str] = set()
        self.most_at_once = 0
        self.refused = threading.Event()
        self.delay = 0.0
        self.retry_after = '0.2'
        self.remembers = False
        self._memory: dict[str, tuple[int, bytes]] = {}
        self.before_answer: Callable[[str], None] = lambda key: None
        self._upstream = upstream
        self._answer = answer
        self._at_once = 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_POST(self) -> None:
                proxy.handle(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a caller that has gone

        self._server = Server(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self._server.server_port}/v1'
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def handle(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers['content-length'])))
        key = handler.headers.get('idempotency-key', '')
        prompt = json.dumps(body.get('prompt', body.get('messages')))
        with self._lock:
            self.asked[key].append(body)
            self.times[key].append(time.monotonic())
            self.keys.add(handler.headers.get('authorization', ''))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = self.faults[prompt].pop(0) if self.faults[prompt] else None
        try:
            respond = self._response(handler, body, key, fault)
        finally:
            # Before it leaves: who has an answer may ask anew at once.
            with self._lock:
                self._at_once -= 1
        respond()

    def _response(
        self, handler: Any, body: dict, key: str, fault: Fault | None
    ) -> Callable[[], None]:
        """Does all but to respond."""
        time.sleep(self.delay)
        if fault == 'reset':
            return lambda: _reset(handler)
        if fault == 'hang':
            return lambda: time.sleep(30)
        if isinstance(fault, str) and fault.isdecimal():
            return lambda: self._refuse(handler, fault)
        status, content = self._made(body, key, handler.headers)
        if fault == 'lost':
            return lambda: _reset(handler)
        if fault == 'truncated':
            content = content[: len(content) // 2]
        elif callable(fault):
            content = json.dumps(fault(json.loads(content))).encode()
        self.before_answer(key)
        with self._lock:
            self.answered[key] += 1
        return lambda: _send(handler, status, content, {})

    def _refuse(self, handler: Any, status: str) -> None:
        headers = {'Retry-After': self.retry_after} if status == '429' else {}
        # Servers like to repeat what they were sent.
        said = {'error': {'message': f'no: {handler.headers["authorization"]}', 'code': None}}
        _send(handler, int(status), json.dumps(said).encode(), headers)
        self.refused.set()

    def _made(self, body: dict, key: str, headers: Any) -> tuple[int, bytes]:
        if self.remembers and key in self._memory:
            return self._memory[key]
        with self._lock:
            self.passed[key] += 1
        self._memory[key] = made = self._fresh(body, headers)
        return made

    def _fresh(self, body: dict, headers: Any) -> tuple[int, bytes]:
        if self._upstream is None:
            return 200, json.dumps(self._answer(body)).encode()
        connection = http.client.HTTPConnection(self._upstream, timeout=120)
        own = {'Authorization': headers['authorization'], 'Content-Type': 'application/json'}
        connection.request('POST', self._path(body), json.dumps(body), own)
        response = connection.getresponse()
        return response.status, response.read()

    @staticmethod
    def _path(body: dict) -> str:
        return '/v1/chat/completions' if 'messages' in body else '/v1/completions'


def _send(handler: Any, status: int, content: bytes, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in {'Content-Type': 'application/json', **headers}.items():
        handler.send_header(name, value)
    handler.send_header('Content-Length', str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def _reset(handler: Any) -> None:
    """Ends the connection by an RST, as a machine does that goes down."""
    linger = struct.pack('ii', 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.close_connection = True
    handler.connection.close()
