"""What a power cut may leave of a recorded piece of work on files, as POSIX allows and no kinder.

A file's content is sure once it was fsynced; before, it may be old, new, short or zeros. A name (made, renamed, deleted) is sure once its folder
was fsynced; before, each change may have come to the disk or not, whatever became of the others. A rename comes as a whole or not at all.
"""

import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

Folder = dict  # name -> number of a file or folder
_COUNT = itertools.count(1)


class Recorder:
    """Runs `work` on the files under `root`; `moments` is the state of the disk at every fsync and change of names.

    The fsync number `left_out`, counted from 0, is not believed to have happened.
    """

    def __init__(self, root: Path, left_out: int | None = None):
        self.root, self._left_out = root, left_out
        self.loose: dict[int, bytes] = {}  # contents not yet fsynced
        self.changes: list[list[tuple[int, str, int | None]]] = []  # of names not yet fsynced: (folder, name, what) that come together
        self.moments: list[tuple] = []
        self.fsyncs: list[str] = []
        self._numbers: dict[int, int] = {}  # of what there is, by inode: those of deleted files are used again
        self._folders, self._files = self._tree()
        self.sure: dict[int, bytes | Folder] = {**self._folders, **self._files}

    def run(self, work: Callable[[], None]) -> None:
        real = {name: getattr(os, name) for name in ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir")}

        def watched(name: str) -> Callable:
            def call(*args, **kwargs):
                self._look()
                if name == "fsync":
                    return self._fsync(args[0], real["fsync"])
                result = real[name](*args, **kwargs)
                self._look()
                return result

            return call

        try:
            for name in real:
                setattr(os, name, watched(name))
            work()
        finally:
            for name, function in real.items():
                setattr(os, name, function)
        self._look()

    def _tree(self) -> tuple[dict[int, Folder], dict[int, bytes]]:
        found = {top: list(os.scandir(top)) for top, _, _ in os.walk(self.root)}
        inodes = [os.stat(self.root).st_ino, *(entry.inode() for entries in found.values() for entry in entries)]
        self._numbers = {inode: self._numbers.get(inode) or next(_COUNT) for inode in inodes}
        folders = {self._numbers[os.stat(top).st_ino]: {e.name: self._numbers[e.inode()] for e in entries} for top, entries in found.items()}
        files = {self._numbers[e.inode()]: Path(e.path).read_bytes() for entries in found.values() for e in entries if e.is_file()}
        return folders, files

    def _look(self) -> None:
        """Note what has changed since the last look: one call at most, and what was written between two."""
        folders, files = self._tree()
        change = []
        for number in {*folders, *self._folders}:
            before, now = self._folders.get(number, {}), folders.get(number, {})
            change += [(number, name, now.get(name)) for name in {*before, *now} if before.get(name) != now.get(name)]
        made = [c for c in change if c[2] is not None and not any(d[2] is None for d in change)]
        for number, content in files.items():
            if content != self._files.get(number):
                self.loose[number] = content
        if change:
            self.changes += [[c] for c in made] if made else [change]
        if change or files != self._files:
            self._folders, self._files = folders, files
            self._note()

    def _fsync(self, handle: int, real: Callable) -> None:
        real(handle)
        number = self._numbers[os.fstat(handle).st_ino]
        self.fsyncs.append(os.readlink(f"/proc/self/fd/{handle}").removeprefix(f"{self.root}/"))
        if len(self.fsyncs) - 1 != self._left_out:
            if number in self._folders:
                self.sure[number] = dict(self._folders[number])
                self.changes = [rest for change in self.changes if (rest := [c for c in change if c[0] != number])]
            else:
                self.sure[number] = self.loose.pop(number, self._files[number])
            self._note()

    def _note(self) -> None:
        self.moments.append((dict(self.sure), dict(self.loose), list(self.changes)))

    def cuts(self, moment: tuple, rng: random.Random, tries: int) -> Iterator[dict[str, bytes]]:
        """Files by path that may be there after a cut at this moment; none is given twice."""
        sure, loose, changes = moment
        extremes = [(all_names, damage) for all_names in (True, False) for damage in DAMAGE]
        seen = set()
        for i in range(tries):
            names, damage = extremes[i] if i < len(extremes) else (None, None)
            folders = {n: dict(c) for n, c in sure.items() if isinstance(c, dict)}
            for change in changes:
                if names if names is not None else rng.random() < 0.5:
                    for folder, name, what in change:
                        place = folders.setdefault(folder, {})
                        if what is None:
                            place.pop(name, None)
                        else:
                            place[name] = what
            contents = {n: c for n, c in sure.items() if isinstance(c, bytes)}
            for number, content in loose.items():
                contents[number] = DAMAGE[damage or rng.choice(list(DAMAGE))](content, contents.get(number, b""))
            files = dict(_walk(self._numbers[os.stat(self.root).st_ino], folders, contents, ""))
            key = hash(frozenset(files.items()))
            if key not in seen:
                seen.add(key)
                yield files


DAMAGE = {
    "new": lambda new, old: new,
    "old": lambda new, old: old,
    "zeros": lambda new, old: bytes(len(new)),
    "short": lambda new, old: new[: len(new) // 2],
}


def _walk(number: int, folders: dict[int, Folder], contents: dict[int, bytes], prefix: str) -> Iterator[tuple[str, bytes]]:
    for name, what in folders.get(number, {}).items():
        if what in contents:
            yield prefix + name, contents[what]
        else:
            yield prefix + name + "/", b""
            yield from _walk(what, folders, contents, prefix + name + "/")


def lay_out(files: dict[str, bytes], root: Path) -> None:
    root.mkdir()
    for name, content in sorted(files.items()):
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
