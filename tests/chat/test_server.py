"""The API as clients see it, the kind ones and the others."""

import json
import resource
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from little_chat import CHAT, answer, ask, load_little, serving

from llm.chat import page
from llm.log import UserError

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def server():
    with serving(has_page=True) as server:
        yield server


def events(content: bytes) -> list:
    lines = content.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_an_answer_is_the_same_whole_and_streamed(server):
    status, headers, content = ask(server, CHAT | {"stream": True, "stream_options": {"include_usage": True}})
    assert status == 200 and headers["Content-Type"] == "text/event-stream"
    *chunks, last, usage = events(content)
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == answer(server) and text
    assert last["choices"][0]["finish_reason"] == "length" and usage["usage"]["completion_tokens"] == 5 and usage["choices"] == []


def test_a_text_is_continued_whole_and_streamed(server):
    request = {"prompt": "once", "max_tokens": 5, "seed": 3, "temperature": 0}
    whole = json.loads(ask(server, request, "/v1/completions")[2])
    assert whole["object"] == "text_completion" and whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    chunks = events(ask(server, request | {"stream": True}, "/v1/completions")[2])
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]


def test_the_model_that_is_asked_for_answers(server):
    listed = [model["id"] for model in json.loads(ask(server, method="GET", path="/v1/models")[2])["data"]]
    assert listed == ["little", "little/other"]
    texts = [answer(server, model=name, max_tokens=30) for name in (*listed, *listed)]
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


def test_max_tokens_are_bounded_by_the_server_and_null_means_not_said(server):
    unset = dict.fromkeys(("temperature", "top_p", "stop", "seed", "n", "tools", "stream", "max_tokens"))
    whole = json.loads(ask(server, CHAT | unset | {"max_completion_tokens": 10**6})[2])
    assert whole["usage"]["completion_tokens"] <= 100


BAD_BODIES = {
    "nothing": b"", "no JSON": b"{", "not UTF-8": b'{"messages": "\xff"}', "a list": b"[]", "NaN": json.dumps(CHAT | {"user": float("nan")}).encode(),
    "nested": b"[" * 60_000, "a huge number": b'{"seed": ' + b"9" * 5000 + b"}",
    "a lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    **{f"{name}={value!r:.40}": json.dumps(CHAT | {name: value}).encode() for name, value in [
        ("temperature", -1), ("temperature", 1e400), ("temperature", "hot"), ("top_p", 0), ("top_p", 2), ("top_k", 0), ("top_k", 1.5),
        ("min_p", -0.1),
        ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 10**30), ("seed", 2**70), ("stop", ""), ("stop", ["x"] * 5), ("stop", ["x" * 300]),
        ("repetition_penalty", 0), ("repetition_penalty", 1e-45),
        ("n", 2), ("tools", [{"type": "function"}]), ("logprobs", True), ("stream", "yes"), ("model", ["little"]),
        ("messages", []), ("messages", "hi"), ("messages", [{"role": "root", "content": "x"}]), ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": None}]), ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "/x"}]}]),
        ("messages", [{"role": "user", "content": "x" * 1000}]), ("messages", [CHAT["messages"][0]] * 2001),
    ]},
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_BODIES)
def test_what_makes_no_sense_gets_a_4xx_in_openais_form(server, bad):
    status, _, content = ask(server, BAD_BODIES[bad])
    error = json.loads(content)["error"]
    assert 400 <= status < 500 and error["type"] == "invalid_request_error" and error["message"]
    assert "Traceback" not in error["message"] and len(content) < 1000


@pytest.mark.parametrize(("changes", "status"), [
    (dict(Host="evil.example"), 403), (dict(Host="localhost.evil.example"), 403), (dict(Host=""), 403),
    (dict(Origin="http://evil.example"), 403), (dict(Origin="null"), 403), (dict(Content_Type="text/plain"), 415),
    (dict(path="/v1/nothing"), 404), (dict(path="/../../etc/passwd"), 404), (dict(method="GET", path="/page.js/../../server.py"), 404),
    (dict(method="GET", path="/web/page.html"), 404), (dict(method="OPTIONS"), 501), (dict(method="DELETE"), 501),
    (dict(Content_Length="-1"), 400), (dict(Content_Length="x"), 400), (dict(Transfer_Encoding="chunked"), 411),
    (dict(body=CHAT | {"model": "../../etc"}), 404), (dict(Host="127.0.0.1:1", Origin="http://127.0.0.1:2"), 403), (dict(Host="localhost:99"), 200),
])  # fmt: skip
def test_callers_that_are_not_ours_and_addresses_that_are_not_there_are_refused(server, changes, status):
    assert ask(server, **changes)[0] == status


def test_a_name_that_was_allowed_is_answered():
    with serving(names=["Chat.example"]) as server:
        assert ask(server, Host="chat.example:80")[0] == 200
        assert ask(server, method="GET", path="/")[0] == 404  # no page unless asked for


def test_the_page_has_nothing_inline_and_says_so(server):
    for path, (kind, content) in page.FILES.items():
        status, headers, got = ask(server, method="GET", path=path)
        assert (status, headers["Content-Type"], got) == (200, kind, content)
        assert "default-src 'none'" in headers["Content-Security-Policy"] and "unsafe" not in headers["Content-Security-Policy"]
    script = page.FILES["/page.js"][1].decode()
    assert not any(way in script for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "http:", "https:"))


def test_ten_megabytes_are_refused_unread_and_in_little_memory(server):
    body = json.dumps(CHAT | {"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        status, _, content = ask(server, body)
        assert status == 413 and "10,000," in json.loads(content)["error"]["message"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # KiB
    assert answer(server)


def test_a_hundred_at_once_get_an_answer_or_429_and_the_queue_stays_bounded():
    with serving(n_waiting=4) as server, ThreadPoolExecutor(100) as pool:
        statuses = [status for status, _, _ in pool.map(lambda _: ask(server, CHAT | {"max_tokens": 50}), range(100))]
        assert set(statuses) <= {200, 429} and statuses.count(200) >= 5
        assert answer(server)
    with serving(n_waiting=100) as server, ThreadPoolExecutor(100) as pool:
        assert {status for status, _, _ in pool.map(lambda _: ask(server), range(100))} == {200}


def test_more_connections_than_may_be_open_are_told_so_and_later_ones_served():
    with serving(connections=3) as server:
        idle = [socket.create_connection(server.server_address) for _ in range(3)]
        until(lambda: server._free._value == 0)
        refused = socket.create_connection(server.server_address)
        refused.settimeout(20)
        assert refused.recv(100).startswith(b"HTTP/1.1 429")
        for connection in idle:
            connection.close()
        until(lambda: server._free._value == 3)
        assert answer(server)


def until(is_true) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_sends_a_byte_now_and_then_is_cut_off_and_keeps_nobody_waiting():
    with serving(arrival_s=0.6) as server:
        slow = socket.create_connection(server.server_address)
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n")
        slow.settimeout(0.05)
        started_at, said = time.monotonic(), b""
        while not said:
            assert time.monotonic() - started_at < 10
            slow.sendall(b"x")
            try:
                said = slow.recv(1000)
            except TimeoutError:
                assert answer(server)
        assert said.startswith(b"HTTP/1.1 408")


def test_a_client_that_says_nothing_is_cut_off():
    with serving(arrival_s=0.3) as server, socket.create_connection(server.server_address) as silent:
        silent.settimeout(10)
        assert silent.recv(100) == b""


class Held:
    """A model that writes a token only when it is let, and counts them."""

    def __init__(self):
        self.n, self.gate = 0, threading.Semaphore(0)

    def load(self, path: Path, step=None):
        assistant = load_little(path)
        return replace(assistant, model=_Watched(assistant.model, self))


class _Watched:
    def __init__(self, model, held: Held):
        self._model, self._held = model, held

    def __getattr__(self, name):
        return getattr(self._model, name)

    def hidden(self, *args):
        assert self._held.gate.acquire(timeout=30)
        self._held.n += 1
        return self._model.hidden(*args)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer_and_what_it_had_waiting_never_begins(stream):
    held = Held()
    with serving(load=held.load) as server:
        leaving = [asking(server, stream=stream) for _ in range(3)]
        until(lambda: len(server.worker._waiting) == 2)
        held.gate.release(3)
        until(lambda: held.n == 3)
        for connection in leaving:
            connection.close()
        until(lambda: server._free._value == server.limits.connections)  # their threads have noticed
        held.gate.release(1000)
        assert answer(server, max_tokens=2)
        assert held.n <= 3 + 1 + 2


def test_who_has_left_while_waiting_holds_no_place():
    held = Held()
    with serving(load=held.load, n_waiting=1) as server:
        answered = asking(server)
        held.gate.release(1)
        until(lambda: held.n == 1)
        leaving = asking(server)
        until(lambda: len(server.worker._waiting) == 1)
        assert ask(server)[0] == 429
        leaving.close()
        until(lambda: server._free._value == server.limits.connections - 1)
        with ThreadPoolExecutor(1) as pool:
            status = pool.submit(lambda: ask(server)[0])
            until(lambda: status.done() or any(not job.cancelled.is_set() for job in server.worker._waiting))
            held.gate.release(1000)
            assert status.result() == 200
        answered.close()


def test_when_the_server_stops_who_waits_is_told_and_nobody_begins_to_wait():
    held = Held()
    with serving(load=held.load) as server, ThreadPoolExecutor(2) as pool:
        answered = asking(server)
        held.gate.release(1)
        until(lambda: held.n == 1)
        waiting = pool.submit(lambda: ask(server)[0])
        until(lambda: server.worker._waiting)
        closing = pool.submit(server.worker.close)
        until(server.worker._is_closed.is_set)
        held.gate.release(1000)
        closing.result()
        assert waiting.result() == 503 and ask(server)[0] == 429 and held.n <= 3
        answered.close()


def asking(server, **changes) -> socket.socket:
    """A connection over which an answer of 100 tokens is on its way."""
    body = json.dumps(CHAT | {"max_tokens": 100} | changes).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(server.server_address)
    connection.sendall(head.encode() + body)
    return connection


def test_a_client_that_reads_nothing_does_not_hold_up_the_others():
    with serving(departure_s=0.5, max_tokens=200) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)  # what connections inherit
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        stuck.connect(server.server_address)
        body = json.dumps(CHAT | {"stream": True, "max_tokens": 200}).encode()
        stuck.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        stuck.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert answer(server)
        until(lambda: server._free._value == server.limits.connections)
        stuck.close()


@pytest.mark.parametrize(("error", "status"), [(OSError, 500), (UserError, 503)])
def test_a_model_that_fails_fails_one_request_and_tells_paths_to_the_log_alone(error, status, capsys):
    def load(path: Path, step=None):
        if path.name == "4":
            raise error("/secret/path")
        return load_little(path)

    with serving(load=load) as server:
        answered, _, content = ask(server, CHAT | {"model": "little/other"})
        assert answered == status and b"secret" not in content
        assert answer(server)
    assert "/secret/path" in capsys.readouterr().out


def test_the_client_library_of_openai_talks_to_it(server):
    openai = pytest.importorskip("openai", reason="the openai client library is not installed")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        assert [model.id for model in client.models.list()][0] == "little"
        how = dict(model="little", messages=CHAT["messages"], max_tokens=6, extra_body={"top_k": 1})
        whole = client.chat.completions.create(**how)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(stream=True, **how))
        assert streamed == whole.choices[0].message.content and whole.usage.completion_tokens == 6
        assert client.completions.create(model="little", prompt="a", max_tokens=3, temperature=0).choices[0].text
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(**how, temperature=-1)
        with pytest.raises(openai.NotFoundError, match="no such model"):
            client.chat.completions.create(**how | {"model": "gpt"})
