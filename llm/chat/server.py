"""An HTTP server with OpenAI's API and a page, on the standard library: one request a connection, everything about it bounded."""

import io
import ipaddress
import json
import secrets
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Empty
from urllib.parse import urlsplit

from llm.chat import page
from llm.chat.api import ApiError, ChatRequest, CompletionRequest, Reply, Request, parse
from llm.chat.prompt import PromptError, TooLong
from llm.chat.session import Assistant
from llm.chat.worker import Busy, Job, Worker
from llm.corpus.conversations import Turn
from llm.generate.generator import Writing
from llm.generate.sampling import Sampling
from llm.log import UserError, log

POSTS = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}


@dataclass(frozen=True)
class Limits:
    max_tokens: int
    """Of an answer, whatever a request asks for."""
    seq_len: int
    arrival_s: float = 20.0
    """In which a request must have come whole."""
    departure_s: float = 20.0
    """For which a client may leave what was written to it unread."""
    connections: int = 128

    @property
    def body_bytes(self) -> int:
        """Far more than the context can hold: JSON may spend 6 bytes on a character, and a chat may be longer than what of it is used."""
        return 65_536 + 64 * self.seq_len


class Server(ThreadingHTTPServer):
    """`names`: hosts by whose names it may be called, beside localhost and plain addresses. Answers until `shutdown`."""

    daemon_threads, request_queue_size = True, 128

    def __init__(
        self, address: tuple[str, int], worker: Worker, limits: Limits, sampling: Sampling, system: str = "", names=(), has_page: bool = False
    ):
        self.worker, self.limits, self.sampling, self.system = worker, limits, sampling, system
        self.pages = page.FILES if has_page else {}
        self.names = {"localhost", address[0].lower(), *(name.lower() for name in names)}
        self._free = threading.BoundedSemaphore(limits.connections)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the network for this machine's name, which may take long

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.server_address[0]).is_loopback

    def process_request(self, request, client_address) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with suppress(OSError):  # no thread for it: told at once, as far as the socket takes it
            request.setblocking(False)
            request.send(b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
            request.recv(65_536)  # closing on unread bytes would take the answer back
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request, client_address) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client that is gone is no news
            log.error(f"a connection failed: {type(error).__name__}: {error}")


class _Arriving(io.RawIOBase):
    """Reads from a socket up to a deadline for all of it, so that a byte now and then keeps nobody waiting."""

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection, self._deadline = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "tally", ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_Arriving(self.connection, self.server.limits.arrival_s))

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_POST(self) -> None:
        self._answered(self._post)

    def log_message(self, *_) -> None:
        """What clients write is not for our terminal."""

    def send_error(self, code, message=None, explain=None) -> None:
        """What the library refuses, in our form."""
        self._send_error(ApiError(code if code < 500 or code == 501 else 400, str(message or "the request cannot be understood")[:200]))

    def _answered(self, act) -> None:
        try:
            self._check_caller()
            act()
        except ApiError as error:
            self._send_error(error)

    def _check_caller(self) -> None:
        """A web page of somebody else must not reach a server on this machine, neither by its own name (Origin) nor by a name that was
        made to point here (Host).
        """
        hosts, origin = self.headers.get_all("Host") or [], self.headers.get("Origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise ApiError(403, "the Host header names a server that this one is not; see --allow-host")
        if origin is not None and origin.lower() not in (f"http://{hosts[0].lower()}", f"https://{hosts[0].lower()}"):
            raise ApiError(403, "pages of other origins may not use this server")

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
            return name in self.server.names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _get(self) -> None:
        if self.path == "/v1/models":
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "tally"} for name in self.server.worker.choices]
            self._send(200, json.dumps({"object": "list", "data": models}).encode())
        elif self.path in self.server.pages:
            kind, content = self.server.pages[self.path]
            self._send(200, content, kind, page.HEADERS)
        else:
            raise ApiError(404, "there is nothing at this address")

    def _post(self) -> None:
        if self.path not in POSTS:
            raise ApiError(404, "there is nothing at this address")
        request = parse(self._body(), POSTS[self.path])
        model = request.model or next(iter(self.server.worker.choices))
        if model not in self.server.worker.choices:
            raise ApiError(404, "there is no such model; /v1/models lists them", param="model", code="model_not_found")
        job = Job(model, lambda assistant, is_cancelled: self._begin(request, assistant, is_cancelled))
        try:
            self.server.worker.submit(job)
        except Busy:
            raise ApiError(429, "too many requests are waiting; try again in a moment", code="queue_full") from None
        try:
            answer = self._stream if request.stream else self._whole
            answer(request, self._events(job), Reply(isinstance(request, ChatRequest), model))
        finally:
            job.cancel()

    def _body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":
            raise ApiError(415, "Content-Type should be application/json")
        if "Transfer-Encoding" in self.headers:
            raise ApiError(411, "send the body with a Content-Length, not in chunks")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise ApiError(411 if not length else 400, "Content-Length should be the number of bytes of the body")
        if int(length) > self.server.limits.body_bytes:
            raise ApiError(413, f"the body has {int(length):,} bytes, and {self.server.limits.body_bytes:,} are the limit", code="too_long")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {self.server.limits.arrival_s:g} s") from None
        if len(body) < int(length):
            raise ApiError(400, "the body is shorter than its Content-Length")
        return body

    def _begin(self, request: Request, assistant: Assistant, is_cancelled) -> Writing:
        """In the worker's thread."""
        limits = self.server.limits
        how = dict(
            max_tokens=min(request.max_completion_tokens or request.max_tokens or limits.max_tokens, limits.max_tokens),
            sampling=request.sampling(self.server.sampling),
            seed=secrets.randbits(32) if request.seed is None else request.seed,
            stop=request.stops(),
            is_cancelled=is_cancelled,
        )
        if isinstance(request, ChatRequest):
            turns = [message.turn() for message in request.messages]
            has_system = any(turn.role == "system" for turn in turns)
            return assistant.answer(turns if has_system or not self.server.system else [Turn("system", self.server.system), *turns], **how)[0]
        text = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
        ids, seq_len = assistant.tokenizer.encode(text), assistant.model.cfg.seq_len
        if len(ids) >= seq_len:
            raise TooLong(f"the prompt has {len(ids):,} tokens, and the context of this model is {seq_len:,}")
        return Writing(assistant.model, assistant.tokenizer, ids, **how | {"max_tokens": min(how["max_tokens"], seq_len - len(ids))})

    def _events(self, job: Job) -> Iterator[str | Writing]:
        """What the worker writes, until it is done. Raises ApiError, or OSError when the client is gone."""
        while True:
            try:
                event = job.events.get(timeout=0.2)
            except Empty:
                event = None
            if self._is_gone():
                raise ConnectionAbortedError
            if isinstance(event, PromptError):
                raise ApiError(400, str(event), code="context_length_exceeded" if isinstance(event, TooLong) else None)
            if isinstance(event, UserError):
                raise ApiError(503, "this model cannot be used at the moment")  # the message would tell paths of this machine
            if isinstance(event, Exception):
                raise ApiError(500, "the answer failed; the log of the server says why")
            if event is not None:
                yield event
            if isinstance(event, Writing):
                return

    def _is_gone(self) -> bool:
        try:
            self.connection.setblocking(False)
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.server.limits.departure_s)

    def _whole(self, request: Request, events: Iterator[str | Writing], reply: Reply) -> None:
        *pieces, writing = events
        self._send(200, json.dumps(reply.whole("".join(pieces), writing)).encode())

    def _stream(self, request: Request, events: Iterator[str | Writing], reply: Reply) -> None:
        event = next(events)  # a request that is refused is refused before there is a stream
        self._head(200, "text/event-stream", {"Cache-Control": "no-store"})
        self._chunk(reply.chunk("", first=True))
        while isinstance(event, str):
            self._chunk(reply.chunk(event))
            try:
                event = next(events)
            except ApiError as error:
                return self._chunk(error.body)
        self._chunk(reply.chunk(None, event.finish_reason))
        if request.stream_options and request.stream_options.include_usage:
            self._chunk(reply.usage_chunk(event))
        self.wfile.write(b"data: [DONE]\n\n")

    def _chunk(self, content: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")

    def _send_error(self, error: ApiError) -> None:
        more = {"Retry-After": "1"} if error.status == 429 else {}
        self._send(error.status, json.dumps(error.body).encode(), headers=more)
        with suppress(OSError):  # closing on bytes that still come in would take the answer back before it is read
            self.connection.shutdown(socket.SHUT_WR)
            rest, buffer = _Arriving(self.connection, 3), bytearray(65_536)
            while rest.readinto(buffer):
                pass

    def _send(self, status: int, content: bytes, kind: str = "application/json", headers: dict | None = None) -> None:
        self._head(status, kind, {"Content-Length": str(len(content)), **(headers or {})})
        self.wfile.write(content)

    def _head(self, status: int, kind: str, headers: dict) -> None:
        self.close_connection = True
        self.connection.settimeout(self.server.limits.departure_s)
        self.send_response(status)
        for name, value in {"Content-Type": kind, "X-Content-Type-Options": "nosniff", "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
