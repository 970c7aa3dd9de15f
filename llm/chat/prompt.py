"""A conversation as the ids that an answer continues: the template of training, without the end of the last turn."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import numpy as np

from llm.corpus.conversations import Conversation, Segment, Template, Turn, render
from llm.log import UserError
from llm.tokenizer.protocol import Tokenizer


class PromptError(UserError):
    """A conversation that the model cannot be asked to go on with."""


class TooLong(PromptError):
    """The context cannot hold it."""


def chat_ids(turns: Sequence[Turn], template: Template, tokenizer: Tokenizer, room: int) -> tuple[list[int], int]:
    """The prompt for the assistant's next turn in at most `room` tokens, and how many of `turns` were left out for that.

    The oldest go first, each question with its answers; the system prompt and the last question stay. Raises TooLong when these
    alone are too long.
    """
    check(template, tokenizer)
    if template.system and not any(turn.role == "system" for turn in turns):
        turns = (Turn("system", template.system), *turns)
    plain = replace(template, system="")
    encoded = [_ids(render(Conversation((turn,)), plain), tokenizer) for turn in turns]
    opening = _ids(_opening(plain), tokenizer)
    n_system = int(bool(turns) and turns[0].role == "system")
    starts = [n_system, *(i for i in range(n_system + 1, len(turns)) if turns[i].role == "user")]
    lengths = [sum(map(len, (*encoded[:n_system], *encoded[start:], opening))) for start in starts]
    for start, length in zip(starts, lengths, strict=True):
        if length <= room:
            return [i for ids in (*encoded[:n_system], *encoded[start:], opening) for i in ids], start - n_system
    raise TooLong(f"the message is too long: {lengths[-1]:,} tokens with what must surround it, and the model has room for {room:,}.")


def stop_ids(template: Template, tokenizer: Tokenizer) -> set[int]:
    """With these an answer is over: no special token of the template can be part of one."""
    return {tokenizer.special_ids[name] for name in template.special if name in tokenizer.special_ids}


def stop_texts(template: Template) -> list[str]:
    """What ends an answer where the template has no special token for it: the text behind {content}."""
    after = template.turn.partition("{content}")[2]
    return [after] if after.strip() and not any(name in after for name in template.special) else []


def check(template: Template, tokenizer: Tokenizer) -> None:
    """Raises PromptError when the tokenizer lacks a special token of the template."""
    for name in template.special_in_use():
        if name not in tokenizer.special_ids:
            raise PromptError(
                f"the chat template needs the special token {name!r}, and this model's tokenizer has none of that name. "
                f"Give the template the model was fine-tuned with: --template FILE."
            )


def _opening(template: Template) -> list[Segment]:
    """What stands before the assistant's words."""
    turn = render(Conversation((Turn("assistant", "x"),)), template)
    return list(takewhile(lambda segment: not segment.is_assistant, turn))


def _ids(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[int]:
    """As shards are encoded: each segment for itself, and names of special tokens become them only where the template put them."""
    pieces = [[tokenizer.special_ids[s.text]] if s.is_special else tokenizer.encode(s.text) for s in segments]
    return np.concatenate(pieces).astype(int).tolist() if pieces else []
