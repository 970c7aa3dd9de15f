"""Tasks that are measured while a run trains. llm.train calls `Tasks.measure` and knows nothing of what is in it."""

import json
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from llm.config import ConfigError, EvalConfig
from llm.corpus.options import ReadOptions
from llm.corpus.read_all import read_all
from llm.dist import World
from llm.eval.mmlu import Subject, evaluate_subject, flat, read_subjects, summary
from llm.eval.perplexity import named, text_sums
from llm.model.transformer import Transformer
from llm.tokenizer.protocol import Tokenizer
from llm.train.validate import summed


@dataclass(frozen=True)
class Tasks:
    shots: int
    subjects: list[Subject]
    """Of MMLU; empty: it is not asked for."""
    texts: dict[str, list[str]]
    """Documents by the path they came from."""

    def measure(self, model: Transformer, tokenizer: Tokenizer, world: World) -> dict[str, float]:
        """{"TASK/METRIC": value}, the same on every rank: each takes its share of questions and documents. Collective."""
        found = self._mmlu(model, tokenizer, world) if self.subjects else {}
        for path, documents in self.texts.items():
            mine = documents[world.rank :: world.size]
            sums = summed(world, world.together(lambda mine=mine: list(text_sums(model, tokenizer, mine))))
            found |= {f"perplexity/{path}/{metric}": value for metric, value in named(*sums).items()}
        return found

    def _mmlu(self, model: Transformer, tokenizer: Tokenizer, world: World) -> dict[str, float]:
        shares = [replace(subject, questions=subject.questions[world.rank :: world.size]) for subject in self.subjects]
        mine = world.together(
            lambda: {s.name: evaluate_subject(model, tokenizer, s, self.shots) for s in shares if s.questions}
        )
        of_ranks = world.gather({name: [part["correct"], part["fewer_shots"], part["cut"]] for name, part in mine.items()})
        parts = [part for rank in of_ranks for part in rank.values()]
        correct = {s.name: [one for rank in of_ranks if s.name in rank for one in rank[s.name][0]] for s in self.subjects}
        values = flat(summary(correct)) | {"fewer_shots": sum(part[1] for part in parts), "cut": sum(part[2] for part in parts)}
        return {f"mmlu-{self.shots}-shot/{name}": float(value) for name, value in values.items()}


def read_tasks(cfg: EvalConfig, world: World) -> Tasks:
    """All that eval.tasks needs, read before the first step. Collective. Raises UserError on every rank."""
    tasks = world.together(lambda: _read(cfg))
    content = [[subject.digest for subject in tasks.subjects], tasks.texts]
    world.refuse_differences("eval.mmlu or eval.texts", json.dumps(content))
    return tasks


def _read(cfg: EvalConfig) -> Tasks:
    subjects, texts = [], {}
    if "mmlu" in cfg.tasks:
        subjects = read_subjects(Path(cfg.mmlu), cfg.subjects or None, cfg.shots)
        subjects = [replace(subject, questions=subject.questions[: cfg.limit]) for subject in subjects]
    if "perplexity" in cfg.tasks:
        if not cfg.texts:
            raise ConfigError("eval.tasks has perplexity, which is measured on texts: give eval.texts, a list of files or folders.")
        texts = {path: [document.text for document in islice(read_all([path], ReadOptions()), cfg.limit)] for path in cfg.texts}
        if empty := [path for path, documents in texts.items() if not any(documents)]:
            raise ConfigError(f"eval.texts: {empty[0]} holds no text to measure.")
    return Tasks(cfg.shots, subjects, texts)
