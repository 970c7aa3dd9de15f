"""What the fields of a record mean: text, or a conversation in one of the forms in which people pass them on.

A shape is recognised by its fields. To add one: a function from fields to text or Conversation that raises ValueError for a record
that is not so, and a row in SHAPES.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from llm.corpus.conversations import Conversation, Turn

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
_FIRST_FIELDS = {"text": ("text", "content", "TEXT"), "dialog": ("dialog", "dialogue", "utterances", "conversation")}
_TABBED, _NAMED = re.compile(r"(.+?)\t(?:\d+ )?(.+)"), re.compile(r"([\w .#-]{1,30}?)\s*:\s+(.+)")


class Shape(NamedTuple):
    said: str
    """What a person is told."""
    fits: Callable[[dict], bool]
    read: Callable[[dict | str], str | Conversation]


def has(*names: str) -> Callable[[dict], bool]:
    return lambda fields: all(name in fields for name in names)


def text_of(fields: dict | str, name: str | None = None) -> str:
    """The text field; without a name, the first of those that usually hold text."""
    if isinstance(fields, str):
        return fields
    name = name or next((name for name in _FIRST_FIELDS["text"] if name in fields), "text")
    if name not in fields:
        raise ValueError(f"no field {name!r}: only {', '.join(map(repr, fields))}; --text-field names another")
    return _string(fields, name)


def _string(fields: dict, name: str) -> str:
    value = fields.get(name)
    if isinstance(value, bytes):
        return value.decode(errors="surrogateescape")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"field {name!r} is no string")
    return value or ""


def _asked(question: str, answer: str, system: str = "") -> Conversation:
    turns = [Turn("user", question), Turn("assistant", answer)]
    return Conversation(tuple([Turn("system", system)] * bool(system) + turns))


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part.strip())


def _messages(fields: dict) -> Conversation:
    return Conversation(tuple(_turn(message, "role", "content") for message in _list(fields, "messages")))


def _sharegpt(fields: dict) -> Conversation:
    turns = [_turn(message, *(("from", "value") if "from" in message else ("role", "content"))) for message in _list(fields, "conversations")]
    system = _string(fields, "system")
    return Conversation((Turn("system", system), *turns) if system and not any(turn.role == "system" for turn in turns) else tuple(turns))


def _turn(message: dict, role_field: str, content_field: str) -> Turn:
    role, content = message.get(role_field), message.get(content_field)
    if role not in _ROLES:
        raise ValueError(f"{role_field} {role!r} is none of {', '.join(_ROLES)}")
    if isinstance(content, list):  # OpenAI's parts
        if any(not isinstance(part, dict) or part.get("type", "text") != "text" for part in content):
            raise ValueError(f"{content_field} has parts that are no text")
        content = "".join(_string(part, "text") for part in content)
    return Turn(_ROLES[role], _string({content_field: content}, content_field))


def _list(fields: dict, name: str) -> list:
    items = fields[name]
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"field {name!r} is no list of objects")
    return items


def _alpaca(fields: dict) -> Conversation:
    context = _string(fields, "input") or _string(fields, "context")
    answer = "output" if "output" in fields else "response"
    return _asked(_joined(_string(fields, "instruction"), context), _string(fields, answer), _string(fields, "system"))


def _prompt(fields: dict) -> Conversation:
    answer = next(name for name in ("response", "completion", "chosen") if name in fields)
    return _asked(_string(fields, "prompt"), _string(fields, answer), _string(fields, "system"))


def _question(fields: dict) -> Conversation:
    return _asked(_string(fields, "question"), _string(fields, "answer"))


def _squad(fields: dict) -> Conversation | str:
    answers = fields["answers"]
    texts = answers.get("text") if isinstance(answers, dict) else [a.get("text") for a in answers if isinstance(a, dict)]
    return _asked(_joined(_string(fields, "context"), _string(fields, "question")), next((t for t in texts or () if t), ""))


def _choice(fields: dict) -> Conversation:
    choices = fields.get("choices") or [fields.get(letter) for letter in "ABCD"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("the choices are no list of strings")
    answer = fields["answer"]
    letter = answer if answer in tuple("ABCDEFGHIJ") else "ABCDEFGHIJ"[int(answer)]
    if "ABCDEFGHIJ".index(letter) >= len(choices):
        raise ValueError(f"answer {answer!r} is none of the {len(choices)} choices")
    lines = "\n".join(f"{name}. {choice}" for name, choice in zip("ABCDEFGHIJ", choices, strict=False))
    return _asked(f"{_string(fields, 'question')}\n{lines}", f"{letter}. {choices['ABCDEFGHIJ'.index(letter)]}")


def _dialog(fields: dict) -> Conversation:
    name = next(name for name in _FIRST_FIELDS["dialog"] if name in fields)
    if not isinstance(fields[name], list) or not all(isinstance(line, str) for line in fields[name]):
        raise ValueError(f"field {name!r} is no list of strings")
    return _alternating(fields[name])


def _alternating(lines: list[str]) -> Conversation:
    return Conversation(tuple(Turn(("user", "assistant")[i % 2], line.strip()) for i, line in enumerate(lines)))


def _script(fields: dict | str) -> Conversation:
    """Lines of 'question TAB answer', or of 'Name: what is said'; a speaker who goes on keeps the turn."""
    if isinstance(fields, dict):
        fields = _string(fields, "Best Generated Conversation") or text_of(fields)
    lines = [line for line in fields.splitlines() if line.strip()]
    pairs = [_TABBED.fullmatch(line) for line in lines]
    if lines and all(pairs):
        return _alternating([said for pair in pairs for said in pair.groups()])
    turns, speakers = [], []
    for line in lines:
        named = _NAMED.fullmatch(line.strip())
        speaker, said = named.groups() if named else (speakers[-1] if speakers else "", line.strip())
        if speakers and speaker == speakers[-1]:
            turns[-1] = f"{turns[-1]}\n{said}"
        else:
            turns, speakers = [*turns, said], [*speakers, speaker]
    if lines and len(turns) < 2:
        raise ValueError("no dialogue: neither 'question TAB answer' nor 'Name: text' lines")
    return _alternating(turns)


def _dictionary(fields: dict) -> str:
    """'word (noun): meaning. "example" Synonyms: a, b' a line for each meaning."""
    word, meanings = _string(fields, "word"), fields.get("meanings") or [{"def": fields.get("definition")}]
    lines = []
    for meaning in meanings:
        definition = _string(meaning, "def") or _string(meaning, "definition")
        if not definition:
            continue
        kind, example = meaning.get("speech_part"), meaning.get("example")
        synonyms = [synonym for synonym in meaning.get("synonyms") or () if synonym]  # Wordset has nulls among them
        extra = (f'. "{example}"' if example else "") + (f". Synonyms: {', '.join(synonyms)}" if synonyms else "")
        lines.append(f"{word}{f' ({kind})' if kind else ''}: {definition}{extra}")
    return "\n".join(lines)


SHAPES = {
    "messages": Shape("conversations in 'messages'", has("messages"), _messages),
    "sharegpt": Shape("ShareGPT conversations", lambda f: isinstance(f.get("conversations"), list), _sharegpt),
    "squad": Shape("questions on a context (SQuAD)", has("context", "question", "answers"), _squad),
    "alpaca": Shape("instructions", lambda f: "instruction" in f and ("output" in f or "response" in f), _alpaca),
    "choice": Shape("multiple choice (MMLU)", lambda f: has("question", "answer")(f) and ("choices" in f or has(*"ABCD")(f)), _choice),
    "question": Shape("questions and answers", has("question", "answer"), _question),
    "prompt": Shape("prompts and responses", lambda f: "prompt" in f and any(n in f for n in ("response", "completion", "chosen")), _prompt),
    "dictionary": Shape("a dictionary", lambda f: "word" in f and ("meanings" in f or "definition" in f), _dictionary),
    "dialog": Shape("lists of utterances", lambda f: any(isinstance(f.get(n), list) for n in _FIRST_FIELDS["dialog"]), _dialog),
    "text": Shape("text", lambda f: any(isinstance(f.get(n), (str, bytes)) for n in _FIRST_FIELDS["text"]), text_of),
    "script": Shape("dialogues, a line for each turn", has("Best Generated Conversation"), _script),
}
TEXT_SHAPES = ("dictionary", "text")  # all others give conversations


def shape_for(fields: dict) -> str | None:
    """The first shape that fits."""
    return next((name for name, shape in SHAPES.items() if shape.fits(fields)), None)
