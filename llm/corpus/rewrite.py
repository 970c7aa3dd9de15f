"""Answers rewritten by a model behind an OpenAI-compatible server on this machine or elsewhere; asked once each, whatever breaks in between."""

import json
import time
import urllib.error
import urllib.request
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from llm.corpus.conversations import Conversation, Turn
from llm.corpus.documents import Document
from llm.log import UserError, log

TRIES, FIRST_PAUSE_S, TIMEOUT_S = 6, 1.0, 120
PROMPT = "Answer the question from the text in one or two whole sentences. The answer must say: {answer}\n\n{question}"


class Rewriter:
    """Documents with their last answers rewritten. What the model has said is kept in `journal`, so a second run asks only for the rest."""

    def __init__(self, url: str, model: str, journal: Path):
        self._url, self._model = url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions", model
        self._said: dict[str, str] = {}
        if journal.exists():
            for line in journal.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                    self._said[record["key"]] = record["answer"]
                except (ValueError, KeyError, TypeError):
                    continue  # the last line of a killed run
            log.info(f"{journal}: {len(self._said):,} answers are there already")
        journal.parent.mkdir(parents=True, exist_ok=True)
        self._journal = open(journal, "a", encoding="utf-8")  # noqa: SIM115  open as long as the program
        self._journal.write("\n")  # after half a line

    def __call__(self, document: Document) -> Document:
        """Raises UserError when the server does not answer for good."""
        talk = document.conversation
        if not talk or talk.turns[-1].role != "assistant":
            return document
        *before, last = talk.turns
        key = sha256(self._model.encode() + document.identity()).hexdigest()
        if key not in self._said:
            self._said[key] = self._ask(PROMPT.format(answer=last.content, question=before[-1].content if before else ""))
            self._journal.write(json.dumps({"key": key, "answer": self._said[key]}, ensure_ascii=False) + "\n")
            self._journal.flush()
        return replace(document, conversation=Conversation((*before, Turn("assistant", self._said[key]))))

    def _ask(self, prompt: str) -> str:
        body = json.dumps({"model": self._model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                    text = json.load(answer)["choices"][0]["message"]["content"].strip()
                if text:
                    return text
                error = ValueError("it said nothing")
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as failure:
                error = failure
                if isinstance(failure, urllib.error.HTTPError) and failure.code in (400, 401, 403, 404):
                    break  # will be no better next time
            if attempt + 1 < TRIES:
                time.sleep(FIRST_PAUSE_S * 2**attempt)
        raise UserError(f"{self._url}: no answer from model {self._model!r} ({error}). Run again when it is there: answers so far are kept.")
