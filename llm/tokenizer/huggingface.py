"""Any tokenizer.json of the Hugging Face tokenizers library."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import tokenizers

from llm import durable
from llm.tokenizer import byte_level
from llm.tokenizer.cut import CUT_CHARS, cut_text
from llm.tokenizer.fingerprint import fingerprint, probes
from llm.tokenizer.protocol import END_OF_TEXT, PAD, SPECIAL_TOKENS, TokenizerError
from llm.tokenizer.ranks import RankEncoder, rank_encoder_of

FILE = "tokenizer.json"
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
"""What Hugging Face keeps beside it; not used here, but carried along, so that an exported model has them again."""
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>")
_PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|padding|>", "<｜▁pad▁｜>")


class HuggingFaceTokenizer:
    """A tokenizer.json; `kind` is "bpe" for one that train_bpe made."""

    def __init__(self, content: bytes, kind: str = "huggingface", origin: str = FILE, companions: Mapping[str, bytes] = MappingProxyType({})):
        self.kind = kind
        self.companions = companions
        self._content = content
        self._hf = _parse(content, origin)
        self._structure = json.loads(self._hf.to_str())
        self._byte_level = any(part.get("type") == "ByteLevel" for part in _parts(self._structure["decoder"]))
        self._cut_chars = CUT_CHARS if _splits_after_letters(self._hf) else None
        self.vocab_size = max(self._hf.get_vocab(with_added_tokens=True).values()) + 1
        self.special_ids = {t["content"]: t["id"] for t in self._structure["added_tokens"] if t["special"]}
        self.eos_id = self._end_of_text(origin)
        self.pad_id = next((self.special_ids[name] for name in _PAD_NAMES if name in self.special_ids), self.eos_id)
        self._refuse_leaks(origin)

    @cached_property
    def rank_encoder(self) -> RankEncoder | None:
        """The same encoder in its fastest exact form, if that can say what this tokenizer does."""
        return rank_encoder_of(self._hf, self._structure)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.rank_encoder:
            return self.rank_encoder.encode_batch(texts)
        if self._cut_chars and any(len(text) > self._cut_chars for text in texts):
            return [np.concatenate([self._encoded([part])[0] for part in cut_text(text, self._cut_chars)]) for text in texts]
        return self._encoded(texts)

    def _encoded(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._hf.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        if self._byte_level:
            return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")
        return self._hf.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes_of.get(token_id, b"")

    def save(self, folder: Path) -> None:
        for name, content in {FILE: self._content, **self.companions}.items():
            durable.write_bytes(Path(folder) / name, content)

    @cached_property
    def fingerprint(self) -> str:
        model = self._structure["model"]
        return fingerprint(
            algorithm=model["type"],
            vocabulary=((i, token) for token, i in self._hf.get_vocab(with_added_tokens=True).items()),
            merges=[pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", [])],
            patterns=[next(iter(p["pattern"].values())) for p in _parts(self._structure["pre_tokenizer"]) if "pattern" in p],
            normalizer=[part["type"] for part in _parts(self._structure["normalizer"]) if "type" in part],
            byte_fallback=bool(model.get("byte_fallback")),
            special_ids=self.special_ids,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            encode=self.encode,
        )

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        added = {token["id"] for token in self._structure["added_tokens"]}
        vocab = self._hf.get_vocab(with_added_tokens=True)
        return {i: token.encode() if i in added else self._piece_bytes(token) for token, i in vocab.items()}

    def _piece_bytes(self, token: str) -> bytes:
        if self._byte_level:
            return byte_level.to_bytes(token)
        if len(token) == 6 and token.startswith("<0x"):  # SentencePiece's byte fallback: <0x0A>
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()

    def _end_of_text(self, origin: str) -> int:
        for name in _END_NAMES:
            if name in self.special_ids:
                return self.special_ids[name]
        raise TokenizerError(
            f"{origin}: has no end-of-text token: none of {', '.join(_END_NAMES)} is among its special tokens. Documents need one "
            f'to end with; add it to the file\'s added_tokens with "special": true, or train a tokenizer with tools/train_tokenizer.py.'
        )

    def _refuse_leaks(self, origin: str) -> None:
        for name, token_id in self.special_ids.items():
            if token_id in self.encode(name):
                raise TokenizerError(
                    f"{origin}: plain text that contains {name!r} would become the special token {token_id}, so anybody's text could end "
                    f"a turn or a document. Tokenizers that cannot tell the two apart are not used here; choose another one."
                )


def is_trained_here(content: bytes) -> bool:
    """Whether a tokenizer.json holds the special tokens that train_bpe gives, and no other."""
    return [token["content"] for token in json.loads(content)["added_tokens"]] == list(SPECIAL_TOKENS)


def _parse(content: bytes, origin: str) -> tokenizers.Tokenizer:
    try:
        hf = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{origin}: is not a tokenizer.json that tokenizers {tokenizers.__version__} can read: {error}.") from error
    hf.encode_special_tokens = True  # special tokens in raw text are text
    hf.no_truncation()
    hf.no_padding()
    if getattr(hf.model, "dropout", None):
        hf.model.dropout = None  # the same text must give the same ids
    return hf


def _parts(node) -> Iterator[dict]:
    """`node` and every dict inside it, in order: the file nests Sequences."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _parts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _parts(value)


def _splits_after_letters(hf: tokenizers.Tokenizer) -> bool:
    """Whether texts may be cut between a letter and white space, tried on the probe strings."""
    if hf.normalizer is not None or hf.pre_tokenizer is None:
        return False

    def pieces(text: str) -> list[str]:
        return [piece for piece, _ in hf.pre_tokenizer.pre_tokenize_str(text)]

    heads, tails = [text + "a" for text in probes()], [space + text for text in probes() for space in " \n"]
    return all(pieces(head + tail) == pieces(head) + pieces(tail) for head, tail in zip(heads * 2, tails, strict=True))
