"""Lines of JSON that tell of a run, in files of its logs. Nothing reads them back to train by, so no run ends for want of one."""

import json
import os
from functools import cache
from pathlib import Path
from typing import BinaryIO

from llm.log import log


def note(path: Path, record: dict) -> None:
    """Append a line. A disk that is full or gone is told of once for each file."""
    line = json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"
    try:
        with open(path, "a+b") as file:
            if _is_torn(file):
                line = b"\n" + line  # a kill or a full disk cut the last one off; this one is whole
            file.write(line)
    except OSError as error:
        _tell(path, error.strerror)


def _is_torn(file: BinaryIO) -> bool:
    """Whether the file does not end with the end of a line."""
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


@cache
def _tell(path: Path, why: str) -> None:
    log.warning(f"{path}: cannot be written ({why}). Training goes on without it.")
