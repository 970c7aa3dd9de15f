"""Named datasets, each made of what is at hand: `download.py --dataset NAME` writes one as a .jsonl file."""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llm.log import UserError


@dataclass(frozen=True)
class Collected:
    docs: int
    bytes: int


def collect(dataset: str, out: Path, max_bytes: int) -> Collected:
    """Write the documents of a recipe to `out`, whole ones, up to `max_bytes` of text."""
    docs, n_bytes = 0, 0
    tmp = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "w", encoding="utf-8") as file:
            for name, text in RECIPES[dataset]():
                size = len(text.encode())
                if n_bytes + size > max_bytes:
                    continue  # a shorter one may still fit
                file.write(json.dumps({"text": text, "source": name}, ensure_ascii=False) + "\n")
                docs, n_bytes = docs + 1, n_bytes + size
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}). Choose another --out.") from None
    if not docs:
        tmp.unlink()
        raise UserError(f"dataset {dataset!r} has no text here within {max_bytes:,} bytes. Raise --max-bytes, or bring text of your own.")
    tmp.replace(out)
    return Collected(docs, n_bytes)


def _python_standard_library() -> Iterator[tuple[str, str]]:
    """The sources of the Python that is running: real text that every machine with Python holds, in the order of their names.

    The tests among them come last, because some distributions leave them out. Tables of character sets are not text to learn from.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "__pycache__", "encodings"}
    files = [file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts)]
    names = sorted(file.relative_to(root).as_posix() for file in files)
    for name in sorted(names, key=_is_test):
        try:
            text = (root / name).read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue  # a few files show off other encodings
        if text and not text.isspace():
            yield name, text


def _is_test(name: str) -> bool:
    return any(part in ("test", "tests", "idle_test") for part in name.split("/"))


RECIPES = {"pystdlib": _python_standard_library}
