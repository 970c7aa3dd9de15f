"""SHA-256 of files, and records of the small ones in a checkpoint."""

import hashlib
import os
from pathlib import Path

from llm import durable


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_records(checkpoint: Path) -> list[dict]:
    """Those of the files in its folder `tokenizer`, if there is one."""
    folder = checkpoint / "tokenizer"
    if not folder.is_dir():
        return []
    records = [small_record(path, checkpoint) for path in sorted(folder.iterdir()) if path.is_file()]
    durable.fsync_folder(folder)
    return records


def small_record(path: Path, checkpoint: Path) -> dict:
    """Make the file durable; returns its manifest record."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        content = file.read()
    name = path.relative_to(checkpoint).as_posix()
    return {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "chunks": []}
