"""JSON records that carry their own hash and appear on disk whole or not at all."""

import hashlib
import json
from pathlib import Path

from llm import durable
from llm.log import UserError


class ShardError(UserError):
    """A shard, or the manifest that lists shards, is damaged, missing or not the one that was expected."""


def sha256_of(*values) -> str:
    """Hex SHA-256 of the canonical JSON of a list of JSON values; the first one says what is being hashed."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_record(path: Path, fields: dict) -> None:
    """Publish `fields` and their own hash at `path`: a reader sees the old record or the new one, never half of one."""
    try:
        durable.write_text(path, json.dumps({**fields, "self_sha256": sha256_of("record", fields)}, indent=1))
    except OSError as error:
        raise ShardError(f"{path}: cannot be written ({error.strerror}). Choose a folder that can be, and has space.") from error


def read_record(path: Path, format_name: str, version: int, remedy: str) -> dict:
    """The fields of a record of this format and version, its own hash checked. `remedy` ends the message of a ShardError."""
    try:
        fields = json.loads(path.read_bytes())
        promised = fields.pop("self_sha256")
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}). {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ShardError(f"{path}: not a whole {format_name} record. {remedy}") from None
    if promised != sha256_of("record", fields):
        raise ShardError(f"{path}: its contents do not match their own hash: damaged or edited after it was written. {remedy}")
    if (fields.get("format"), fields.get("version")) != (format_name, version):
        raise ShardError(f"{path}: holds {fields.get('format')} version {fields.get('version')}, this program reads "
                         f"{format_name} version {version}. Use the program that wrote it, or tokenize again.")
    return fields
