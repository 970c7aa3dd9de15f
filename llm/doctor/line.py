"""What an examination finds: one line each, ok, warn or fail, with what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass

from llm.log import UserError

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Line:
    name: str
    status: str
    found: str
    advice: str = ""
    """Dropped where all is well."""
    host: str = ""

    def __post_init__(self):
        if self.status == OK:
            object.__setattr__(self, "advice", "")


def examined(name: str, look: Callable[[], Line]) -> Line:
    """The line that `look` gives; whatever it raises, and a broken library may raise anything, is a failure and not the end."""
    try:
        return look()
    except UserError as error:
        return Line(name, FAIL, str(error))
    except Exception as error:
        return Line(name, FAIL, f"{type(error).__name__}: {first_words(str(error))}")


def first_words(text: str, limit: int = 240) -> str:
    """The first line that says something, cut where it grows long."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= limit else line[:limit] + " ..."
