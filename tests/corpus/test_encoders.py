"""Which encoder made the tokens does not show in the shards."""

import pytest
from raw_text import contents

from llm.corpus import encode
from llm.corpus.encode import FAST, REFERENCE
from llm.corpus.tokenize_corpus import tokenize_corpus
from llm.tokenizer import fast
from llm.tokenizer.fast import FastPathWrong

pytest.importorskip("gigatoken")


class InThisProcess:
    """Stands for the pool, so that what a worker does can be disturbed."""

    def submit(self, run, *args):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(run(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def test_the_fast_encoder_the_reference_and_a_fast_one_found_wrong_midway_give_the_same_shards(request_for, raw, monkeypatch, capsys):
    from contextlib import contextmanager

    from llm.corpus import pool

    tokenize_corpus(request_for("reference/data", encoder=REFERENCE, val_ratio=0.1, shuffle_seed=3))
    tokenize_corpus(request_for("fast/data", encoder=FAST, val_ratio=0.1, shuffle_seed=3, workers=2))
    assert "not used" not in capsys.readouterr().out

    @contextmanager
    def here(job, workers):
        encode.prepare(job)
        yield InThisProcess()

    calls, real = [], fast.FastEncoder.encode_batch

    def wrong_after_two(self, texts):
        calls.append(0)
        if len(calls) == 3:
            raise FastPathWrong("it gives [1], the reference [2]")
        return [ids + 1 for ids in real(self, texts)]  # as if it had been wrong from the start

    monkeypatch.setattr(pool, "_processes", here)
    monkeypatch.setattr(fast.FastEncoder, "encode_batch", wrong_after_two)
    tokenize_corpus(request_for("dropped/data", encoder=FAST, val_ratio=0.1, shuffle_seed=3))
    assert "the fast encoder is not used: it gives [1], the reference [2]" in capsys.readouterr().out
    reference = contents(request_for("reference/data").out)
    assert len(reference) >= 6
    assert contents(request_for("fast/data").out) == contents(request_for("dropped/data").out) == reference


def test_without_gigatoken_the_reference_encodes_and_says_so(request_for, raw, monkeypatch, capsys):
    monkeypatch.setattr(fast, "find_spec", lambda name: None)
    tokenize_corpus(request_for())
    assert "gigatoken" in capsys.readouterr().out
