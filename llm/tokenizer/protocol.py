"""What every tokenizer is to the rest of Tally, and the special tokens of ChatML."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from llm.log import UserError

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, PAD)


class TokenizerError(UserError):
    """A tokenizer file that is missing, unreadable or not what it was said to be."""


class Tokenizer(Protocol):
    """Text to ids and back. Special tokens never come out of text: whoever wants one puts its id there."""

    kind: str
    """"huggingface", "bpe" or "tiktoken"."""
    vocab_size: int
    """1 + the largest id that can ever occur."""
    eos_id: int
    pad_id: int
    special_ids: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what it does, not of its files' bytes: equal fingerprints give equal ids."""

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text` as uint32, without an end-of-text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are spelled out, ids beyond the vocabulary leave nothing."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to the text; none for an id beyond the vocabulary."""

    def save(self, folder: Path) -> None:
        """Write the files that `load_tokenizer` reads back, byte for byte those it was loaded from."""


def tokenizer_info(tokenizer: Tokenizer) -> dict:
    """What shards and checkpoints keep to recognise their tokenizer by."""
    return {key: getattr(tokenizer, key) for key in ("fingerprint", "kind", "vocab_size", "eos_id", "pad_id")}
