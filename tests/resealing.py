"""Manifests changed and sealed again, as somebody with bad intentions, or a fault in the program, would write them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from llm.checkpoint.manifest import NAME


def forge(checkpoint: Path, change: Callable[[dict], object]) -> None:
    """Rewrite its manifest with a valid seal."""
    fields = json.loads((checkpoint / NAME).read_text())
    change(fields)
    fields.pop("self_sha256")
    text = json.dumps(fields, sort_keys=True)
    (checkpoint / NAME).write_text(json.dumps(fields | {"self_sha256": hashlib.sha256(text.encode()).hexdigest()}))
