"""Byte-level BPE as ranks, tiktoken's form: each token's id is also the priority of the merge that makes it. The fastest exact encoder here."""

from collections.abc import Sequence

import numpy as np
import tiktoken
import tokenizers

from llm.tokenizer import byte_level
from llm.tokenizer.cut import CUT_CHARS, cut_text
from llm.tokenizer.fingerprint import probes


class RankEncoder:
    """Plain text to ids. `ranks`: the bytes of each token to its id; `pattern` splits the text before anything is merged."""

    def __init__(self, ranks: dict[bytes, int], pattern: str):
        self.ranks, self.pattern = ranks, pattern
        self._encoding = tiktoken.Encoding("ranks", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> np.ndarray:
        parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in cut_text(text, CUT_CHARS)]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]


def rank_encoder_of(hf: tokenizers.Tokenizer, structure: dict) -> RankEncoder | None:
    """The same encoder in the form of ranks, or None where that form cannot say what this tokenizer.json does.

    A merge may join any two tokens whose bytes make a token here, where tokenizer.json names the two. That is the same if ids follow the
    merges, as in training, and if every token is what its own bytes encode to.
    """
    model, pattern = structure["model"], _pattern(structure["pre_tokenizer"])
    plain = not any(model.get(k) for k in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
    if model["type"] != "BPE" or not plain or structure["normalizer"] or pattern is None:
        return None
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made, vocab = [a + b for a, b in merges], model["vocab"]
    if {*byte_level.BYTE_OF, *made} != vocab.keys() or len(vocab) != len(made) + 256:
        return None
    ids = [*sorted(vocab[char] for char in byte_level.BYTE_OF), *(vocab[token] for token in made)]
    if ids != list(range(len(ids))) or any(len(hf.model.tokenize(token)) != 1 for token in made):
        return None
    try:
        found = RankEncoder({byte_level.to_bytes(token): i for token, i in vocab.items()}, pattern)
    except ValueError:  # a pattern that only the other library's regular expressions know
        return None
    theirs = hf.encode_batch_fast(probes(), add_special_tokens=False)
    return found if all(ids.tolist() == t.ids for ids, t in zip(found.encode_batch(probes()), theirs, strict=True)) else None


def _pattern(pre_tokenizer: dict | None) -> str | None:
    parts = (pre_tokenizer or {}).get("pretokenizers") or []
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, bytes_ = parts
    usual = split["behavior"] == "Isolated" and not split["invert"] and not bytes_["use_regex"] and not bytes_["add_prefix_space"]
    return split["pattern"].get("Regex") if usual else None


def tokenizer_of(ranks: dict[bytes, int], pattern: str) -> tokenizers.Tokenizer:
    """The same as a tokenizer.json, without special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    names = {token: "".join(byte_level.CHAR_OF[byte] for byte in token) for token in ranks}
    merges = [tuple(names[part] for part in _halves(token, ranks)) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab={names[token]: rank for token, rank in ranks.items()}, merges=merges))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge makes this one: what its bytes come to before the last merge."""
    parts, own = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], own))
        assert ranks.get(parts[best] + parts[best + 1], own) < own, f"no two tokens make {token!r}"
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts
