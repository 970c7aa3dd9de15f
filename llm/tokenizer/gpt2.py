"""GPT-2's vocabulary through tiktoken, extended with ChatML's special tokens. Reads local files only."""

import base64
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from llm import durable
from llm.tokenizer import byte_level
from llm.tokenizer.fingerprint import fingerprint
from llm.tokenizer.protocol import END_OF_TEXT, PAD, SPECIAL_TOKENS, TokenizerError
from llm.tokenizer.ranks import RankEncoder

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
MERGES, VOCABULARY = "vocab.bpe", "encoder.json"
RANKS = ("gpt2.tiktoken", "r50k_base.tiktoken")  # a .tiktoken file does not say its pattern; these two have GPT-2's
HOW_TO_PROVIDE = (
    f"Put GPT-2's {VOCABULARY} and {MERGES} (OpenAI's published files, on many mirrors), or {' or '.join(RANKS)}, into one folder and give "
    f"that folder as the tokenizer's path; nothing is ever downloaded."
)


class TiktokenTokenizer:
    """GPT-2 byte-level BPE. `files`: name to content of either encoder.json + vocab.bpe or one .tiktoken file."""

    kind = "tiktoken"

    def __init__(self, files: dict[str, bytes], origin: str):
        self._files = files
        try:
            self.ranks = _ranks_of_merges(files) if MERGES in files else _ranks_of_lines(next(iter(files.values())))
        except (ValueError, KeyError) as error:
            raise TokenizerError(f"{origin}: cannot be read as GPT-2's vocabulary: {error}. {HOW_TO_PROVIDE}") from error
        self.special_ids = {name: len(self.ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.eos_id, self.pad_id = self.special_ids[END_OF_TEXT], self.special_ids[PAD]
        self.vocab_size = len(self.ranks) + len(SPECIAL_TOKENS)
        self.rank_encoder = RankEncoder(self.ranks, PATTERN)
        self._bytes_of = {i: token for token, i in self.ranks.items()} | {i: name.encode() for name, i in self.special_ids.items()}

    def encode(self, text: str) -> np.ndarray:
        return self.rank_encoder.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.rank_encoder.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes_of.get(token_id, b"")

    def save(self, folder: Path) -> None:
        for name, content in self._files.items():
            durable.write_bytes(Path(folder) / name, content)

    @cached_property
    def fingerprint(self) -> str:
        special = ((i, name) for name, i in self.special_ids.items())
        return fingerprint(
            algorithm="tiktoken",
            vocabulary=[*((rank, token.hex()) for token, rank in self.ranks.items()), *special],
            merges=[],  # the ranks are the merges
            patterns=[PATTERN],
            normalizer=[],
            byte_fallback=False,
            special_ids=self.special_ids,
            eos_id=self.eos_id,
            pad_id=self.pad_id,
            encode=self.encode,
        )


def _ranks_of_merges(files: dict[str, bytes]) -> dict[bytes, int]:
    """Ids from the merges, the 256 bytes first; refuses an encoder.json that disagrees."""
    lines = files[MERGES].decode().split("\n")[1:]  # the first line names the version
    merged = [byte_level.to_bytes(line.replace(" ", "")) for line in lines if line]
    ranks = {token: rank for rank, token in enumerate([*(bytes([b]) for b in byte_level.BYTE_OF.values()), *merged])}
    vocabulary = {name: i for name, i in json.loads(files[VOCABULARY]).items() if name not in SPECIAL_TOKENS}
    if {byte_level.to_bytes(name): i for name, i in vocabulary.items()} != ranks:
        raise ValueError(f"{VOCABULARY} and {MERGES} are not of one vocabulary")
    return ranks


def _ranks_of_lines(content: bytes) -> dict[bytes, int]:
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines() if line)}
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise ValueError("its ranks have gaps, or some single byte has none")
    return ranks
