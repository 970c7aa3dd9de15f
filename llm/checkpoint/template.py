"""The chat template that a model was trained with, in its checkpoints beside the tokenizer. What it means is llm.corpus' to say."""

import json
from pathlib import Path

from llm.checkpoint.manifest import read_small
from llm.checkpoint.slices import CheckpointError

FILE = "template.json"
MOST_BYTES = 1 << 20


def write_template(checkpoint: Path, template: dict) -> None:
    (checkpoint / "tokenizer" / FILE).write_text(json.dumps(template, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def template_file(checkpoint: Path) -> Path | None:
    """Where it lies; None for a model that saw no conversations, or a checkpoint older than these files."""
    path = checkpoint / "tokenizer" / FILE
    return path if path.exists() else None


def read_template(checkpoint: Path) -> dict | None:
    """As `write_template` was given it. Raises CheckpointError."""
    path = template_file(checkpoint)
    if path is None:
        return None
    try:
        template = json.loads(read_small(path, MOST_BYTES))
        if not isinstance(template, dict) or not isinstance(template.get("name"), str):
            raise ValueError("it has no name")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: holds no chat template ({error}).") from None
    return template
