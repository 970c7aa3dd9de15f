"""Which datasets were made with a tokenizer, so that nobody replaces it unawares.

used_by.json lies beside a tokenizer that tools/train_tokenizer.py has made and lists dataset
folders, relative to its own. Any other folder that holds a tokenizer (a download, a checkpoint, one
of another user's) is only read.
"""

import json
import os
from pathlib import Path

from llm import durable
from llm.data.manifest import load_manifest
from llm.data.record import ShardError
from llm.log import log

_NOTE = "used_by.json"


def begin_note(folder: Path) -> None:
    """Mark `folder` as one of train_tokenizer.py's. A note that is there stays. Raises OSError."""
    if _noted(folder) is None:
        durable.write_text(folder / _NOTE, "[]")


def note_use(tokenizer_path: Path, dataset: Path) -> None:
    """Note that `dataset` is made with the tokenizer at `tokenizer_path`, where we may."""
    folder = _folder(tokenizer_path)
    noted = _noted(folder)
    if noted is None or not _is_own(folder):
        return
    name = os.path.relpath(os.path.realpath(dataset), folder)
    if name in noted:
        return
    try:
        durable.write_text(folder / _NOTE, json.dumps(sorted([*noted, name]), indent=1))
    except OSError as error:
        log.warning(
            f"{folder / _NOTE}: cannot be written ({error.strerror}), so train_tokenizer.py will "
            f"not refuse to replace this tokenizer"
        )


def datasets_made_with(tokenizer_path: Path, fingerprint: str) -> list[Path] | None:
    """Datasets in the note that still hold shards of this tokenizer; None where nothing tells."""
    folder = _folder(tokenizer_path)
    noted = _noted(folder)
    if noted is None:
        return None
    # earlier versions wrote them relative to the path as it was given, links unresolved
    bases = (folder, tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent)
    paths = {os.path.realpath(os.path.normpath(base / name)) for name in noted for base in bases}
    return [path for path in map(Path, sorted(paths)) if _fingerprint_of(path) == fingerprint]


def _folder(tokenizer_path: Path) -> Path:
    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    return Path(os.path.realpath(folder))


def _is_own(folder: Path) -> bool:
    """Whether this user owns the folder and may write it; root may write all, and owns few."""
    status = folder.stat()
    return status.st_uid == os.geteuid() and bool(status.st_mode & 0o200)


def _noted(folder: Path) -> list[str] | None:
    """The note's paths; None where there is no note that can be read."""
    try:
        noted = json.loads((folder / _NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_list = isinstance(noted, list) and all(isinstance(name, str) for name in noted)
    return noted if is_list else None


def _fingerprint_of(dataset: Path) -> str | None:
    try:
        return load_manifest(dataset).tokenizer["fingerprint"]
    except (ShardError, OSError):
        return None
