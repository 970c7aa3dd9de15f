"""Token ids as text, for programs that read them so."""

import json
from pathlib import Path

from llm.data.manifest import load_manifest
from llm.data.shards import Shard


def emit_jsonl(folder: Path) -> None:
    """Beside each shard of a dataset that has none yet, a .jsonl: one list of ids a line, a document each."""
    for entry in load_manifest(folder).shards:
        shard = Shard.open(folder / entry["path"])
        path = folder / f"{shard.meta.name}.jsonl"
        if not path.exists():
            _write(shard, path)


def _write(shard: Shard, path: Path) -> None:
    tmp, start = path.with_name(path.name + ".tmp"), 0
    with open(tmp, "w", encoding="ascii") as file:
        for end in shard.doc_ends.tolist():
            file.write(json.dumps(shard.tokens(start, end).tolist()) + "\n")
            start = end
    tmp.replace(path)
