"""A conversation with a model: what was said so far, and the next answer."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm import durable
from llm.chat.prompt import chat_ids, stop_ids, stop_texts
from llm.corpus.conversations import ROLES, Conversation, Template, Turn
from llm.generate.generator import Writing
from llm.generate.sampling import Sampling
from llm.log import UserError
from llm.model.transformer import Transformer
from llm.tokenizer.protocol import Tokenizer


@dataclass(frozen=True)
class Assistant:
    """A model that answers in a template."""

    model: Transformer
    tokenizer: Tokenizer
    template: Template
    step: int = 0
    """Of the checkpoint."""

    def answer(self, turns: Sequence[Turn], *, max_tokens: int, stop: Sequence[str] = (), **how) -> tuple[Writing, int]:
        """The assistant's next turn, and how many turns it cannot take into account. Raises PromptError.

        A quarter of the context, or `max_tokens` if less, is kept free for it.
        """
        seq_len = self.model.cfg.seq_len
        prompt, left_out = chat_ids(turns, self.template, self.tokenizer, seq_len - min(max_tokens, max(1, seq_len // 4)))
        max_tokens = min(max_tokens, seq_len - len(prompt))  # past the context the template would be lost
        ends = dict(stop_ids=stop_ids(self.template, self.tokenizer), stop=[*stop, *stop_texts(self.template)])
        return Writing(self.model, self.tokenizer, prompt, max_tokens=max_tokens, **ends, **how), left_out


@dataclass
class Session:
    """A chat and how it is answered."""

    assistant: Assistant
    sampling: Sampling
    max_tokens: int
    seed: int
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    left_out: int = 0
    """Turns that the last answer could not take into account."""

    def ask(self, text: str) -> Iterator[str]:
        """The answer, in pieces; as far as it was taken it becomes part of the chat. A question that is refused does not."""
        turns = [*self._system(), *self.turns, Turn("user", text)]
        writing, self.left_out = self.assistant.answer(turns, max_tokens=self.max_tokens, sampling=self.sampling, seed=self.seed)
        self.seed += 1
        return self._noted(text, writing)

    def _noted(self, text: str, writing: Writing) -> Iterator[str]:
        written = ""
        try:
            for piece in writing:
                written += piece
                yield piece
        finally:
            self.turns += [Turn("user", text), Turn("assistant", written)]

    def _system(self) -> list[Turn]:
        return [Turn("system", self.system)] if self.system else []

    def save(self, path: Path) -> None:
        """As one line of JSON that tools/tokenize_parallel.py reads too. Raises UserError."""
        line = json.dumps(Conversation((*self._system(), *self.turns)).to_json(), ensure_ascii=False)
        try:
            durable.write_text(path, line + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}).") from None

    def load(self, path: Path) -> None:
        """Go on with a chat that `save` wrote. Raises UserError, and leaves this one as it is."""
        try:
            messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
            turns = [Turn(m["role"], m["content"]) for m in messages]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path}: is not a chat that /save wrote ({type(error).__name__}: {error}).") from None
        if not all(turn.role in ROLES and isinstance(turn.content, str) for turn in turns):
            raise UserError(f"{path}: is not a chat that /save wrote: a message has another role than {', '.join(ROLES)}, or no text.")
        has_system = bool(turns) and turns[0].role == "system"
        self.system, self.turns = turns[0].content if has_system else "", turns[has_system:]
