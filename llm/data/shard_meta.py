"""The format of a shard and its commit record.

NAME.bin        token ids, raw little-endian, no header; uint16 or uint32 as `token_dtype` says
NAME.idx        the exclusive token end of each document, raw little-endian u64, strictly increasing
NAME.mask       (start, length) pairs of u32: the spans that carry loss, in order; no file means that every token does
NAME.meta.json  the commit record: the shard exists if and only if this does, and its own hash is right
NAME is for people. The same contents under another name are the same shard.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from .record import read_record, sha256_of

FORMAT, VERSION = "tally-shard", 1
META_SUFFIX = ".meta.json"
CRC_BLOCK_BYTES = 4 << 20
IDX_DTYPE, MASK_DTYPE = np.dtype("<u8"), np.dtype("<u4")


def token_dtype(vocab_size: int) -> np.dtype:
    """The one rule for the width of ids on disk; `vocab_size` is 1 + the largest id that can ever occur."""
    assert 0 < vocab_size <= 2**31, vocab_size  # ids are hashed and fed as signed numbers
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


@dataclass(frozen=True)
class ShardMeta:
    """What NAME.meta.json says. `path` is where it lies now, so a renamed shard goes by its new name."""

    path: Path
    shard_id: str
    n_tokens: int
    n_docs: int
    n_bytes: int
    """UTF-8 bytes of the text that the tokens stand for; 0 when they came without text."""
    dtype: str
    min_id: int
    max_id: int
    role: str
    """train or val"""
    seq_len: int
    """What the shard was made for. Not part of shard_id: the tokens are the same for any."""
    tokenizer: dict
    """fingerprint, kind, vocab_size, eos_id, pad_id"""
    units: list[dict]
    """The slices of text inside, in order: at least unit_id and bytes of each."""
    files: dict[str, dict]
    """For each of bin, idx and perhaps mask: bytes, sha256, and crc32 of each 4 MiB block."""
    writer: dict

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(META_SUFFIX)

    @property
    def unit_ids(self) -> list[str]:
        return [unit["unit_id"] for unit in self.units]

    def file(self, kind: str) -> Path:
        return self.path.with_name(f"{self.name}.{kind}")

    def remedy(self) -> str:
        return remedy(self.path)

    def to_json(self) -> dict:
        return {"format": FORMAT, "version": VERSION, **{k: v for k, v in asdict(self).items() if k != "path"}}

    @classmethod
    def read(cls, path: Path) -> "ShardMeta":
        """The record at `path`, its own hash checked. Raises ShardError."""
        record = read_record(path, FORMAT, VERSION, remedy(path))
        return cls(path=path, **{field.name: record[field.name] for field in fields(cls) if field.name != "path"})


def meta_path_of(path: Path) -> Path:
    """The commit record of a shard that is named by its .bin, its .meta.json or what these have in common."""
    return path.with_name(path.name.removesuffix(META_SUFFIX).removesuffix(".bin") + META_SUFFIX)


def shard_id_of(fingerprint: str, dtype: str, n_tokens: int, files: dict[str, dict]) -> str:
    """The identity of a shard: its tokens, documents and mask, never what it is called or was made for."""
    return sha256_of(FORMAT, VERSION, fingerprint, dtype, n_tokens, {kind: file["sha256"] for kind, file in files.items()})


def remedy(meta_path: Path) -> str:
    """The end of every message about a damaged shard: what to do."""
    name = meta_path.name.removesuffix(META_SUFFIX)
    return f"Restore {name}.* from a copy, or delete them and run the tokenizing again: finished shards are kept."
