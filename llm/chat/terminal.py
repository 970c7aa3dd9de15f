"""A chat at the keyboard."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from llm.chat.session import Session
from llm.generate.generator import visible
from llm.log import UserError

HELP = """/reset         forget what was said
/system TEXT   the system prompt; alone: show it; /system none takes it away
/temp X        temperature, now {temperature:g}; 0 always takes the likeliest word
/save FILE     keep this chat in a file        /load FILE   go on with one
/quit          leave, as Ctrl-D does; Ctrl-C stops an answer"""


def converse(session: Session, read: Callable[[str], str] = input) -> None:
    """Questions from `read` until its end, answers as they are made."""
    own_files: set[Path] = set()
    while True:
        try:
            line = read("you> ").strip()
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                print(_command(session, own_files, line))
            elif line:
                _answer(session, line)
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")
        except UserError as error:
            print(visible(f"error: {error}"))


def _answer(session: Session, text: str) -> None:
    with _noticing_ctrl_c() as was_pressed, closing(session.ask(text)) as pieces:
        if session.left_out:
            print(f"(the first {session.left_out} turns no longer fit and are left out)")
        for piece in pieces:
            print(visible(piece), end="", flush=True)
            if was_pressed():
                print(" (stopped)", end="")
                break
    print()


@contextmanager
def _noticing_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, to be acted on between two tokens; pressed again it interrupts at once."""
    pressed = []

    def note(*_) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _command(session: Session, own_files: set[Path], line: str) -> str:
    """Do it and say what was done. Raises UserError."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/help":
        return HELP.format(temperature=session.sampling.temperature)
    if name == "/reset":
        session.turns.clear()
        return "(forgotten)"
    if name == "/system":
        session.system = "" if rest == "none" else rest or session.system
        return visible(f"(system prompt: {session.system or 'none'})")
    if name == "/temp":
        session.sampling = replace(session.sampling, temperature=_number(rest))
        return f"(temperature {session.sampling.temperature:g})"
    if name in ("/save", "/load"):
        return _file(session, own_files, name, rest)
    raise UserError(f"{name}: no such command; /help lists them.")


def _file(session: Session, own_files: set[Path], name: str, rest: str) -> str:
    if not rest:
        raise UserError(f"{name} needs a file: {name} chat.json")
    path = Path(os.path.expanduser(rest))  # Path's own raises where there is no such user, its exists() where the name is too long
    if name == "/load":
        session.load(path)
    elif os.path.exists(path) and path not in own_files:
        raise UserError(f"{path}: is there already, and not of this chat. Give another name.")
    else:
        session.save(path)
    own_files.add(path)
    return visible(f"({len(session.turns)} turns {'read from' if name == '/load' else 'in'} {path})")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"/temp {text}: is not a number; 0.8 is common.") from None
