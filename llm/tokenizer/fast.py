"""gigatoken, many times faster than the reference encoder, and used only as long as it gives the same ids."""

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import tiktoken

from llm.tokenizer import gpt2
from llm.tokenizer.fingerprint import probes
from llm.tokenizer.protocol import Tokenizer
from llm.tokenizer.ranks import RankEncoder, tokenizer_of

CHECKED_CHARS = 4 << 20  # compared in full at the start of each process
CHECK_ONE_BATCH_OF = 1000  # after that
RENEW_CHARS = 1 << 30  # its cache of words has no stated bound
_PROBED_BELOW = 0x20000  # characters above are rare enough to be left to the reference without a question
# GPT-2's pattern as gigatoken knows it: the same matches as tiktoken's form of it, which gigatoken refuses
_KNOWN_FORM = {gpt2.PATTERN: r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


class FastPathWrong(Exception):
    """The fast encoder has given other ids than the reference for some text, or has failed. Tells where."""


class FastEncoder:
    """What `Tokenizer.encode_batch` gives, by gigatoken, checked against the tokenizer's reference as it goes. Raises FastPathWrong.

    Characters that the reference's Unicode tables do not know may be letters in gigatoken's, so it is never asked about such texts.
    """

    def __init__(self, reference: RankEncoder):
        self._reference = reference
        self._json = tokenizer_of(reference.ranks, _KNOWN_FORM.get(reference.pattern, reference.pattern)).to_str()
        self._renew()
        self._checked, self._batches = 0, 0
        self._compare(probes(), self._encode(probes()))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._encode(texts)
        self._batches += 1
        if self._checked < CHECKED_CHARS or self._batches % CHECK_ONE_BATCH_OF == 0:
            self._compare(texts, found)
        return found

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._since_renewed > RENEW_CHARS:
            self._renew()
        self._since_renewed += sum(map(len, texts))
        return [self._fast(text) if text.isascii() or _is_known(text) else self._reference.encode(text) for text in texts]

    def _compare(self, texts: Sequence[str], found: list[np.ndarray]) -> None:
        for text, ids in zip(texts, found, strict=True):
            expected = self._reference.encode(text)
            if not np.array_equal(ids, expected):
                n = min(len(ids), len(expected))
                at = int(np.argmax(np.append(ids[:n] != expected[:n], True)))
                theirs, ours = ids[at : at + 3].tolist(), expected[at : at + 3].tolist()
                raise FastPathWrong(f"from token {at:,} of a text that begins {text[:40]!r} it gives {theirs}, the reference {ours}")
            self._checked += len(text)

    def _renew(self) -> None:
        self._fast, self._since_renewed = _gigatoken(self._json), 0


def no_fast_encoder(tokenizer: Tokenizer) -> str | None:
    """Why there can be no FastEncoder for this tokenizer here, if so."""
    if getattr(tokenizer, "rank_encoder", None) is None:
        return "this tokenizer is no byte-level BPE whose ids follow its merges"
    return None if find_spec("gigatoken") else "gigatoken, about ten times as fast, is not installed (pip install 'tally-llm[fast]')"


def _gigatoken(content: str):
    import gigatoken

    try:
        return gigatoken.Tokenizer.from_json(content).backend.encode
    except Exception as error:  # the library has no class of its own for what it cannot load
        raise FastPathWrong(f"gigatoken cannot load this tokenizer: {str(error).partition(chr(10))[0]}") from error


def _is_known(text: str) -> bool:
    others = "".join(_NOT_ASCII.findall(text))
    return max(others) < chr(_PROBED_BELOW) and _unknown_characters().isdisjoint(others)


@cache
def _unknown_characters() -> frozenset[str]:
    """Those below _PROBED_BELOW that are unassigned for the reference encoder."""
    unassigned = tiktoken.Encoding("unassigned", pat_str=r"\p{Cn}", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
    asked = "".join(chr(i) for i in range(_PROBED_BELOW) if not 0xD800 <= i < 0xE000)
    return frozenset(bytes(unassigned.encode_to_numpy(asked, disallowed_special=()).astype(np.uint8)).decode())
