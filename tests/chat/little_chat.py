"""A tiny assistant, and a server with it in this process."""

import http.client
import json
import threading
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from llm.chat.server import Limits, Server
from llm.chat.session import Assistant
from llm.chat.worker import Worker
from llm.config import ModelConfig
from llm.corpus.conversations import CHATML
from llm.generate.sampling import Sampling
from llm.model.init import build_model
from llm.tokenizer.train import train_bpe

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "seed": 1, "temperature": 0}


@cache
def little_assistant(seq_len: int = 256, seed: int = 1) -> Assistant:
    tokenizer = train_bpe(["plain bytes"], vocab_size=256).tokenizer
    cfg = ModelConfig(n_layers=1, d_model=32, n_heads=4, d_ff=48, seq_len=seq_len, init_std=0.3).with_vocab(tokenizer.vocab_size)
    return Assistant(build_model(cfg, seed).eval(), tokenizer, CHATML)


# of these weights, greedily: 5 writes on for ever, 4 for a while
def load_little(path: Path, step=None):
    return little_assistant(seed=int(path.name))


@contextmanager
def serving(n_waiting: int = 8, has_page: bool = False, load=load_little, names=(), **limits):
    """A server on a free port of this machine; it and its threads are gone afterwards."""
    worker = Worker({"little": (Path("5"), None), "little/other": (Path("4"), None)}, load, n_waiting)
    bounds = Limits(**{"max_tokens": 100, "seq_len": worker.seq_len, "arrival_s": 5.0, "departure_s": 5.0} | limits)
    server = Server(("127.0.0.1", 0), worker, bounds, Sampling(1.0), names=names, has_page=has_page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        worker.close()
        thread.join()


def ask(server: Server, body=CHAT, path="/v1/chat/completions", method="POST", **headers):
    """(status, headers, bytes). `body` that is not bytes goes as JSON."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, content if method == "POST" else None, sent)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def answer(server: Server, **changes) -> str:
    status, _, content = ask(server, CHAT | changes)
    assert status == 200, content
    return json.loads(content)["choices"][0]["message"]["content"]
