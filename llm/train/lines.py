"""Lines of JSON that tell of a run, in files of its logs. Nothing reads them back to train by, so no run ends for want of one."""

import json
from functools import cache
from pathlib import Path

from llm.log import log


def note(path: Path, record: dict) -> None:
    """Append a line. A disk that is full or gone is told of once for each file."""
    try:
        with open(path, "a", encoding="utf-8", errors="replace") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        _tell(path, error.strerror)


@cache
def _tell(path: Path, why: str) -> None:
    log.warning(f"{path}: cannot be written ({why}). Training goes on without it.")
