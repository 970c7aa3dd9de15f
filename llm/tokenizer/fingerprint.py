"""A tokenizer's identity: what it contains and what it does, never the bytes of its files, whose form changes between library versions."""

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cache

import numpy as np

N_PROBES = 200

_FRAGMENTS = (
    "the", " The", "hello", " world", "ING", "'s", "'S", "'ll", "’t", "don't", "x", " a", "_", "__init__", "camelCase",
    "0", "7", "42", "1234567", "3.14159", "-1e-9", "0x7f", "²", "½", "٣٤", "१२३",
    " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u200b", "\u200d", "\ufeff", "\x00", "\x1b[0m", "\x7f",
    ".", ",", "...", "!?", "-", "--", "—", "(", ")", "[]", "{}", "=>", "!=", "#", "@", "$", "%", "&&", "\\", "/", "//", "``", '"', "«»",
    "é", "e\u0301", "ñ", "ß", "ﬁ", "İ", "straße", "naïve", "Привет", " мир", "Ελλάδα", "שלום", "مرحبا", "नमस्ते", "ไทย",
    "中文", "日本語", "한국어", "ｆｕｌｌ",
    "😀", "👩‍👩‍👧", "🏳️‍🌈", "🇩🇪", "\U0001d54f", "\U0010ffff", "\ufffd",
    "def f(x):\n    return x", "<p>", "&amp;", "https://example.org/?a=b", "a@b.de", "\u0300\u0301", "aaaaaaaa", "========", "\t\t\tif",
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "</s>", "<s>", "[PAD]", "▁", "▁the", "##ing", "Ġthe",
)  # fmt: skip


@cache
def probes() -> list[str]:
    """About 200 awkward strings: each fragment alone, then sequences of two to nine that a hash has picked."""
    mixed = []
    for number in range(N_PROBES - len(_FRAGMENTS)):
        picks = hashlib.sha256(f"probe {number}".encode()).digest()
        mixed.append("".join(_FRAGMENTS[pick % len(_FRAGMENTS)] for pick in picks[1 : 3 + picks[0] % 8]))
    return [*_FRAGMENTS, *mixed]


def fingerprint(
    *,
    algorithm: str,
    vocabulary: Iterable[tuple[int, str]],
    merges: list,
    patterns: list[str],
    normalizer: list[str],
    byte_fallback: bool,
    special_ids: dict[str, int],
    eos_id: int,
    pad_id: int,
    encode: Callable[[str], np.ndarray],
) -> str:
    """SHA-256 hex of the canonical JSON of these and of the ids of the probe strings. `vocabulary`: (id, token as text)."""
    content = {
        "algorithm": algorithm,
        "vocabulary": sorted(vocabulary),
        "merges": merges,
        "patterns": patterns,
        "normalizer": normalizer,
        "byte_fallback": byte_fallback,
        "special_ids": special_ids,
        "policy": {"eos_id": eos_id, "pad_id": pad_id, "special_in_text": "ordinary"},
        "probes": [encode(text).tolist() for text in probes()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
