"""MMLU (arXiv 2009.03300): multiple choice in 57 subjects, answered by the likelier letter. Prompts as in lm-evaluation-harness."""

import csv
import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm.eval.likelihood import Pair, encode_pair, score
from llm.log import UserError
from llm.model.transformer import Transformer
from llm.tokenizer.protocol import Tokenizer

LETTERS = "ABCD"
LAYOUT = "MMLU's own layout is FOLDER/dev/SUBJECT_dev.csv (the examples) and FOLDER/test/SUBJECT_test.csv: question, four choices, letter."
CATEGORIES = {
    "STEM": """abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science college_mathematics
        college_physics computer_security conceptual_physics electrical_engineering elementary_mathematics high_school_biology
        high_school_chemistry high_school_computer_science high_school_mathematics high_school_physics high_school_statistics
        machine_learning""",
    "humanities": """formal_logic high_school_european_history high_school_us_history high_school_world_history international_law
        jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law world_religions""",
    "social sciences": """econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
        high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations security_studies
        sociology us_foreign_policy""",
    "other": """business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing medical_genetics
        miscellaneous nutrition professional_accounting professional_medicine virology""",
}
CATEGORY = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects.split()}


@dataclass(frozen=True)
class Question:
    text: str
    choices: tuple[str, ...]
    answer: str
    """A letter."""

    @property
    def prompt(self) -> str:
        """Ends where the answer's letter follows."""
        choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, self.choices, strict=True))
        return f"{self.text.strip()}\n{choices}Answer:"


@dataclass(frozen=True)
class Subject:
    name: str
    examples: list[Question]
    questions: list[Question]
    digest: str
    """Of the files' bytes."""

    @property
    def category(self) -> str:
        return CATEGORY.get(self.name, "other")

    def prompt(self, question: Question, shots: int) -> str:
        """The description, the first `shots` examples with their answers, the question."""
        description = f"The following are multiple choice questions (with answers) about {self.name.replace('_', ' ')}.\n\n"
        return description + "".join(f"{example.prompt} {example.answer}\n\n" for example in self.examples[:shots]) + question.prompt


def read_subjects(folder: Path, names: list[str] | None = None, shots: int = 0) -> list[Subject]:
    """The subjects of a folder in MMLU's own layout, all or these. Raises UserError, also where there are fewer than `shots` examples."""
    paths = {path.name.removesuffix("_test.csv"): path for path in sorted((folder / "test").glob("*_test.csv"))}
    if not paths:
        raise UserError(f"{folder}: holds no subject of MMLU. {LAYOUT}")
    if unknown := sorted(set(names or ()) - paths.keys()):
        raise UserError(f"{folder}: has no subject {', '.join(unknown)}; there are {', '.join(paths)}.")
    subjects = [_read_subject(name, folder / "dev" / f"{name}_dev.csv", path) for name, path in paths.items() if not names or name in names]
    for subject in subjects:
        if len(subject.examples) < shots:
            raise UserError(f"{folder}: {subject.name} has {len(subject.examples)} examples for {shots} shots. {LAYOUT}")
    return subjects


def _read_subject(name: str, examples: Path, test: Path) -> Subject:
    contents = [path.read_bytes() if path.exists() else b"" for path in (examples, test)]
    questions = _parse(contents[1], test)
    if not questions:
        raise UserError(f"{test}: holds no question. {LAYOUT}")
    return Subject(name, _parse(contents[0], examples), questions, hashlib.sha256(b"\0".join(contents)).hexdigest())


def _parse(content: bytes, path: Path) -> list[Question]:
    questions = []
    try:
        rows = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is not CSV in UTF-8 ({error}). {LAYOUT}") from None
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in tuple(LETTERS):
            raise UserError(f"{path}, record {number}: {len(row)} columns, the last {row[-1:]}, but should be six, the last a letter of {LETTERS}.")
        questions.append(Question(row[0], tuple(row[1:5]), row[5]))
    return questions


def evaluate_subject(model: Transformer, tokenizer: Tokenizer, subject: Subject, shots: int, advance: Callable[[int], None] = lambda n: None) -> dict:
    """{"answers": the model's letters, "correct": 0 or 1 each, "fewer_shots", "cut"}: how many prompts lost examples, and more than those.

    `advance` hears of answers scored, four a question.
    """
    letters = [encode_pair(tokenizer, subject.prompt(subject.questions[0], 0), f" {letter}")[1] for letter in LETTERS]
    room = model.cfg.seq_len + 1 - max(map(len, letters))  # the last token of an answer is not read
    fits = _fit(tokenizer, subject, shots, room)
    answers = [""] * len(fits)
    for kept in {kept for kept, _ in fits}:  # prompts with the same examples have them read once
        numbers = [number for number, (its, _) in enumerate(fits) if its == kept]
        pairs: list[Pair] = [(fits[number][1], letter) for number in numbers for letter in letters]
        scores = [found.log_likelihood for found in score(model, pairs, advance)]
        for at, number in enumerate(numbers):
            four = scores[4 * at : 4 * at + 4]
            answers[number] = LETTERS[four.index(max(four))]  # of equals the first, as in the harness
    return {
        "answers": "".join(answers),
        "correct": [int(mine == question.answer) for mine, question in zip(answers, subject.questions, strict=True)],
        "fewer_shots": sum(kept < shots for kept, _ in fits),
        "cut": sum(len(ids) > room for _, ids in fits),
    }


def _fit(tokenizer: Tokenizer, subject: Subject, shots: int, room: int) -> list[tuple[int, list[int]]]:
    """(examples kept, ids) of each prompt: as many of the examples as leave room for the question."""
    fits: list = [None] * len(subject.questions)
    waiting = list(range(len(fits)))
    for kept in range(shots, -1, -1):
        found = tokenizer.encode_batch([subject.prompt(subject.questions[number], kept) for number in waiting])
        for number, ids in zip(waiting, found, strict=True):
            fits[number] = (kept, ids.tolist()) if len(ids) <= room or kept == 0 else None
        waiting = [number for number in waiting if fits[number] is None]
    return fits


def summary(subjects: dict[str, list[int]]) -> dict[str, dict]:
    """Accuracy, standard error and number of questions of each category, of all questions ("all"), and of the mean over subjects ("macro").

    Standard errors are of the mean with the sample deviation, within subjects where several are pooled, as in lm-evaluation-harness.
    """
    groups = {category: [s for s in subjects if CATEGORY.get(s, "other") == category] for category in CATEGORIES}
    found = {category: _pooled([subjects[s] for s in names]) for category, names in groups.items() if names}
    each = [accuracy(correct) for correct in subjects.values()]
    macro = {
        "acc": sum(one["acc"] for one in each) / len(each),
        "stderr": math.sqrt(sum(one["stderr"] ** 2 for one in each)) / len(each),
        "n": sum(one["n"] for one in each),
    }
    return found | {"all": _pooled(list(subjects.values())), "macro": macro}


def flat(totals: dict[str, dict]) -> dict[str, float]:
    """`summary` as metrics with names."""
    return {f"{name}{suffix}": values[key] for name, values in totals.items() for key, suffix in (("acc", ""), ("stderr", "_stderr"))}


def accuracy(correct: list[int]) -> dict:
    """Mean, standard error and number of 0s and 1s."""
    n, mean = len(correct), sum(correct) / len(correct)
    return {"acc": mean, "stderr": math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else 0.0, "n": n}


def _pooled(subjects: list[list[int]]) -> dict:
    each = [accuracy(correct) for correct in subjects]
    n = sum(one["n"] for one in each)
    squares = sum((one["n"] - 1) * one["n"] * one["stderr"] ** 2 for one in each)  # sums of squared deviations
    return {
        "acc": sum(map(sum, subjects)) / n,
        "stderr": math.sqrt(squares / (n - len(each)) / n) if n > len(each) else 0.0,
        "n": n,
    }
