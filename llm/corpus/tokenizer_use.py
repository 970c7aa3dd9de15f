"""Which datasets were made with a tokenizer: a note beside the tokenizer, so that nobody overwrites it unawares."""

import json
import os
from pathlib import Path

from llm import durable
from llm.data.manifest import load_manifest
from llm.data.record import ShardError
from llm.log import log

_NOTE = "used_by.json"


def note_use(tokenizer_path: Path, dataset: Path) -> None:
    """Write down that `dataset` is made with the tokenizer at `tokenizer_path`."""
    folder = _folder(tokenizer_path)
    used_by = sorted({*_noted(folder), os.path.relpath(dataset, folder)})
    try:
        durable.write_text(folder / _NOTE, json.dumps(used_by, indent=1))
    except OSError as error:
        log.warning(f"{folder / _NOTE}: cannot be written ({error.strerror}), so nothing will warn whoever replaces this tokenizer")


def datasets_made_with(tokenizer_path: Path, fingerprint: str) -> list[Path]:
    """Dataset folders in the note that still hold shards of this tokenizer."""
    folder = _folder(tokenizer_path)
    return [dataset for name in _noted(folder) if _fingerprint_of(dataset := Path(os.path.normpath(folder / name))) == fingerprint]


def _folder(tokenizer_path: Path) -> Path:
    return tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent


def _noted(folder: Path) -> list[str]:
    note = folder / _NOTE
    return json.loads(note.read_text(encoding="utf-8")) if note.exists() else []


def _fingerprint_of(dataset: Path) -> str | None:
    try:
        return load_manifest(dataset).tokenizer["fingerprint"]
    except ShardError:
        return None
