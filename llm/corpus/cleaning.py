"""Cleaning steps for documents, each of which counts what it drops."""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from llm.corpus.conversations import Conversation, Turn
from llm.corpus.documents import Document

_FOREIGN = re.compile("[^\x00-\x7f]{2,}")  # misread UTF-8 is always such a run
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")


@dataclass
class Cleaning:
    """What is to be done. `counts` says afterwards what has been."""

    repair_unicode: bool = False
    drop_lines: tuple[str, ...] = ()
    """Regular expressions: lines in which one is found are left out."""
    min_chars: int = 0
    max_chars: int | None = None
    dedup: bool = False
    counts: Counter = field(default_factory=Counter)
    _seen: set[bytes] = field(default_factory=set)

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents that remain, as they are then. Conversations are cleaned turn by turn."""
        lines = [re.compile(pattern) for pattern in self.drop_lines]
        for document in documents:
            self.counts["documents read"] += 1
            if self.repair_unicode:
                document = self._changed(document, repaired, "documents with repaired characters")
            if lines:
                document = self._changed(document, lambda text: self._without(lines, text), "documents with lines left out")
            if why := self._why_not(document):
                self.counts[f"documents dropped: {why}"] += 1
            else:
                self.counts["documents kept"] += 1
                yield document

    def _why_not(self, document: Document) -> str | None:
        n_chars = len(document.text)
        if not document.text.strip():
            return "nothing left"
        if n_chars < self.min_chars:
            return f"shorter than {self.min_chars:,} characters"
        if self.max_chars is not None and n_chars > self.max_chars:
            return f"longer than {self.max_chars:,} characters"
        if self.dedup:
            digest = hashlib.sha256(document.identity()).digest()[:16]
            if digest in self._seen:
                return "seen before"
            self._seen.add(digest)
        return None

    def _changed(self, document: Document, change: Callable[[str], str], what: str) -> Document:
        text, talk = change(document.text), document.conversation
        if talk:
            talk = Conversation(tuple(Turn(turn.role, change(turn.content)) for turn in talk.turns))
        self.counts[what] += (text, talk) != (document.text, document.conversation)
        return replace(document, text=text, conversation=talk)

    def _without(self, patterns: list[re.Pattern], text: str) -> str:
        kept = [line for line in text.split("\n") if not any(pattern.search(line) for pattern in patterns)]
        self.counts["lines left out"] += text.count("\n") + 1 - len(kept)
        return "\n".join(kept)


def repaired(text: str) -> str:
    """UTF-8 that was read as Windows-1252 put right, characters composed (NFC), no control characters, plain line ends."""
    text = _FOREIGN.sub(lambda run: _reread(run[0]), text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", _CONTROLS.sub("", text))


def _reread(run: str) -> str:
    try:
        return b"".join(map(_byte, run)).decode()
    except (UnicodeEncodeError, UnicodeDecodeError):
        return run  # it was right, or is beyond repair


def _byte(char: str) -> bytes:
    """As Windows-1252, which leaves five bytes undefined that programs pass through."""
    return bytes([ord(char)]) if char in "\x81\x8d\x8f\x90\x9d" else char.encode("cp1252")
