"""Training of a byte-level BPE on a sample of the text."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llm.log import UserError, log
from llm.tokenizer.cut import cut_text
from llm.tokenizer.huggingface import HuggingFaceTokenizer
from llm.tokenizer.protocol import SPECIAL_TOKENS
from llm.tokenizer.ranks import tokenizer_of

# Llama 3's form of GPT-4's split: words with one leading space or sign, digits by threes, line ends apart.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MAX_SAMPLE_BYTES = 2**31 - 1  # the trainer counts pairs in 32 bits
MAX_TOKEN_BYTES = 32
_SPARE_OF = 20  # one token in so many is learned beyond what is asked for, in place of those that are too long
_PIECE_CHARS = 1 << 14  # a long document is sampled in pieces, else one book would be all or nothing
_HELD_OUT_OF = 20  # one piece in so many is kept from the training to measure on


@dataclass(frozen=True)
class Trained:
    tokenizer: HuggingFaceTokenizer
    sample_bytes: int
    bytes_per_token: float
    measured_on: str


def train_bpe(documents: Iterable[str], vocab_size: int, sample_bytes: int = 1 << 30) -> Trained:
    """A byte-level BPE of `vocab_size` plain tokens, with the special tokens after them.

    Depends on the texts only, not on their order: the sample is those pieces whose digests are smallest.
    """
    if vocab_size < 256:
        raise UserError(f"vocabulary size {vocab_size} is too small: each of the 256 bytes needs a token of its own. Ask for 256 or more.")
    if not 0 < sample_bytes <= MAX_SAMPLE_BYTES:
        raise UserError(f"a sample of {sample_bytes:,} bytes is out of range: the trainer's 32-bit counts hold up to {MAX_SAMPLE_BYTES:,}.")
    sample, kept_out = _Sample(sample_bytes), _Sample(max(1, sample_bytes // _HELD_OUT_OF))
    for text in documents:
        for digest, piece in _pieces(text):
            (kept_out if _is_held_out(digest) else sample).add(digest, piece)
    if not sample.bytes:
        sample, kept_out = kept_out, sample
    if not sample.bytes:
        raise UserError("there is no text to train a tokenizer on: the inputs hold no document that is not empty.")
    tokenizer = HuggingFaceTokenizer(_train(sample.texts(), vocab_size).encode(), kind="bpe")
    if (plain := tokenizer.vocab_size - len(SPECIAL_TOKENS)) < vocab_size:
        log.warning(f"the text has only {plain:,} tokens worth having, not {vocab_size:,}; give more text or ask for fewer")
    measured = kept_out if kept_out.bytes else sample
    n_tokens = sum(len(ids) for ids in tokenizer.encode_batch(list(measured.texts())))
    return Trained(tokenizer, sample.bytes, measured.bytes / n_tokens, "held-out text" if kept_out.bytes else "its own training text")


def held_out(text: str) -> list[str]:
    """Those pieces of a document that `train_bpe` never trains on."""
    return [piece for digest, piece in _pieces(text) if _is_held_out(digest)]


def _pieces(text: str) -> Iterator[tuple[bytes, str]]:
    return ((hashlib.sha256(piece.encode()).digest(), piece) for piece in cut_text(text, _PIECE_CHARS))


def _is_held_out(digest: bytes) -> bool:
    return digest[-1] % _HELD_OUT_OF == 0


class _Sample:
    """The pieces with the smallest digests, up to a number of bytes."""

    def __init__(self, limit: int):
        self.bytes, self._limit, self._heap = 0, limit, []

    def add(self, digest: bytes, text: str) -> None:
        heapq.heappush(self._heap, (-int.from_bytes(digest, "big"), content := text.encode()))
        self.bytes += len(content)
        while self.bytes > self._limit and len(self._heap) > 1:
            self.bytes -= len(heapq.heappop(self._heap)[1])

    def texts(self) -> Iterator[str]:
        return (content.decode() for _, content in sorted(self._heap))


def _train(texts: Iterator[str], vocab_size: int) -> str:
    import rustbpe
    from tokenizers import AddedToken

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(texts, vocab_size + vocab_size // _SPARE_OF, buffer_size=256, pattern=PATTERN)
    learned = sorted(((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks()))
    # rulers of equal signs would fill the vocabulary; what is made of a long token is longer still, so what remains is whole
    kept = [token for _, token in learned if len(token) <= MAX_TOKEN_BYTES][:vocab_size]
    bpe = tokenizer_of({token: i for i, token in enumerate(kept)}, PATTERN)
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
    return bpe.to_str(pretty=True)
