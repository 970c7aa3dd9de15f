"""Conversations, and how a template turns one into the text that a model sees: what is a special token, and what carries loss."""

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import yaml

from llm.checkpoint.template import template_file
from llm.log import UserError
from llm.tokenizer.protocol import IM_END, IM_START

ROLES = ("system", "user", "assistant", "tool")


class Turn(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in their order; a system prompt is a turn of its own, the first."""

    turns: tuple[Turn, ...]

    def to_json(self) -> dict:
        """The form in which OpenAI's and most other chat data come."""
        return {"messages": [turn._asdict() for turn in self.turns]}

    def identity(self) -> bytes:
        """What is hashed to recognise it: who says what, whatever template or file it is in. No text looks like it by accident."""
        return b"tally-conversation/v1" + json.dumps(self.turns, ensure_ascii=False, separators=(",", ":")).encode()


class Segment(NamedTuple):
    text: str
    is_special: bool
    """`text` is the name of a special token that the template put there; in all other segments the same letters are only letters."""
    is_assistant: bool
    """The assistant says it, so it carries loss."""


@dataclass(frozen=True)
class Template:
    """How one turn is written. What follows {content} up to the next special token, or all of it where there is none, is the turn's end,
    which the assistant must learn too.
    """

    turn: str = f"{IM_START}{{role}}\n{{content}}{IM_END}\n"
    special: tuple[str, ...] = (IM_START, IM_END)
    """Names of the special tokens in `turn`."""
    roles: tuple[tuple[str, str], ...] = ()
    """(role, what the template calls it), where the two differ."""
    system: str = ""
    """The system prompt of conversations that bring none."""
    name: str = field(default="ChatML", compare=False)
    """For people."""

    def to_json(self) -> dict:
        """What a dataset keeps of it."""
        return {"name": self.name, "turn": self.turn, "special": list(self.special), "roles": dict(self.roles), "system": self.system}

    def special_in_use(self) -> list[str]:
        """The special tokens that it writes."""
        return [part for part in _parts(self) if part in self.special]


CHATML = Template()


def load_template(path: Path | str) -> Template:
    """A template from a YAML or JSON file with `turn` and perhaps `special`, `roles` and `system`. Raises UserError."""
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Give a YAML file with a chat template.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML: {' '.join(str(error).split())}.") from None
    known = {"turn": str, "special": list, "roles": dict, "system": str, "name": str}
    if not isinstance(fields, dict) or not fields.get("turn"):
        raise UserError(f"{path}: has no 'turn'. A template says how one turn is written, for example turn: {CHATML.turn!r}.")
    for key, value in fields.items():
        if not isinstance(value, known.get(key, ())):
            raise UserError(f"{path}: {key!r} with {value!r} is not understood. Keys: {', '.join(f'{k} ({t.__name__})' for k, t in known.items())}.")
    if fields["turn"].count("{content}") != 1:
        raise UserError(f"{path}: 'turn' must hold {{content}} once, and it is {fields['turn']!r}.")
    special, roles = tuple(map(str, fields.get("special", CHATML.special))), tuple(sorted(fields.get("roles", {}).items()))
    return Template(fields["turn"], special, roles, fields.get("system", ""), fields.get("name", Path(path).name))


def kept_template(checkpoint: Path) -> Template | None:
    """The one that a checkpoint's model was trained with, if it says so. Raises UserError."""
    path = template_file(checkpoint)
    return load_template(path) if path else None


def to_jinja(template: Template) -> str:
    """The same for Hugging Face's apply_chat_template."""
    before, after = template.turn.split("{content}")
    role = "message['role']"
    if template.roles:
        role = f"{json.dumps(dict(template.roles), ensure_ascii=False)}.get({role}, {role})"

    def text(part: str, role: str) -> str:
        """`part` as an expression, in which `role` stands for {role}."""
        pieces = [json.dumps(piece, ensure_ascii=False) for piece in part.split("{role}")]
        return f" + {role} + ".join(pieces)

    def called(name: str) -> str:
        return json.dumps(dict(template.roles).get(name, name), ensure_ascii=False)

    system = ""
    if template.system:
        written = f"{text(before, called('system'))} + {json.dumps(template.system, ensure_ascii=False)} + {text(after, called('system'))}"
        system = f"{{% if messages | selectattr('role', 'equalto', 'system') | list | length == 0 %}}{{{{ {written} }}}}{{% endif %}}"
    turns = f"{{% for message in messages %}}{{{{ {text(before, role)} + message['content'] + {text(after, role)} }}}}{{% endfor %}}"
    return f"{system}{turns}{{% if add_generation_prompt %}}{{{{ {text(before, called('assistant'))} }}}}{{% endif %}}"


def render(conversation: Conversation, template: Template = CHATML) -> list[Segment]:
    """The conversation as segments, in order; their joined texts are what stands in the template's form."""
    turns = conversation.turns
    if template.system and not any(turn.role == "system" for turn in turns):
        turns = (Turn("system", template.system), *turns)
    return [segment for turn in turns for segment in _rendered(turn, template)]


def _rendered(turn: Turn, template: Template) -> list[Segment]:
    parts = _parts(template)
    role = dict(template.roles).get(turn.role, turn.role)
    after_content = parts.index("{content}")
    end = next((i for i in range(after_content, len(parts)) if parts[i] in template.special), len(parts))
    segments = []
    for i, part in enumerate(parts):
        text = turn.content if part == "{content}" else part.replace("{role}", role)
        if text:
            segments.append(Segment(text, part in template.special, turn.role == "assistant" and after_content <= i <= end))
    return segments


@lru_cache(maxsize=8)
def _parts(template: Template) -> list[str]:
    """The turn cut at {content} and at its special tokens, which are parts of their own."""
    names = "|".join(map(re.escape, ("{content}", *sorted(template.special, key=len, reverse=True))))
    return [part for part in re.split(f"({names})", template.turn) if part]
