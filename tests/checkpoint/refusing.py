"""An operating system that refuses: os.open, os.read, os.stat or os.listdir raise an OSError for what lies in a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def refusing(call: str, number: int, inside: Path) -> Iterator[list[str]]:
    """`call` is open, read, stat (lstat and fstat as well) or listdir. Yields what it was refused for."""
    refused: list[str] = []
    names = {"stat": ("stat", "lstat", "fstat")}.get(call, (call,))
    originals = {name: getattr(os, name) for name in names}

    def refuse_inside(original):
        def called(what, *args, **kwargs):
            place = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
            if isinstance(place, str) and place.startswith(str(inside)):
                refused.append(place)
                raise OSError(number, os.strerror(number), None if isinstance(what, int) else place)
            return original(what, *args, **kwargs)

        return called

    for name, original in originals.items():
        setattr(os, name, refuse_inside(original))
    try:
        yield refused
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
