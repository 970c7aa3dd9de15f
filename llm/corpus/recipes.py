"""Named datasets, from where they come to documents: `download.py --dataset NAME` writes one as a .jsonl file."""

import csv
import re
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llm import durable
from llm.corpus.options import ReadOptions
from llm.log import UserError, log


@dataclass(frozen=True)
class Recipe:
    about: str
    licence: str
    size: str
    """Of the download, about."""
    repo: str | None = None
    """A dataset on the Hugging Face hub."""
    files: tuple[str, ...] = ()
    """Patterns of its files that are wanted; without a repo: addresses."""
    options: ReadOptions = ReadOptions()
    change: Callable[[str], str] = staticmethod(lambda text: text)
    """What is done to each text."""
    local: Callable[[], Iterator[tuple[str, str]]] | None = None
    """(name, text) pairs of what every machine holds."""
    layout: Callable[[list[Path], Path], None] | None = None
    """Writes its files in another form too, into a folder beside the documents."""
    max_bytes: int | None = None
    """No more text than this unless the person says so."""


def python_standard_library() -> Iterator[tuple[str, str]]:
    """The sources of the Python that is running: real text that every machine with Python holds, in the order of their names.

    The tests among them come last, because some distributions leave them out. Tables of character sets are not text to learn from.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "__pycache__", "encodings"}
    files = [file for file in root.rglob("*.py") if not left_out & set(file.relative_to(root).parts)]
    names = sorted(file.relative_to(root).as_posix() for file in files)
    for name in sorted(names, key=_is_test):
        try:
            text = (root / name).read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue  # a few files show off other encodings
        if text and not text.isspace():
            yield name, text


def _is_test(name: str) -> bool:
    return any(part in ("test", "tests", "idle_test") for part in name.split("/"))


_START = re.compile(r"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*?\*\*\*", re.DOTALL | re.IGNORECASE)
_END = re.compile(r"\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK|\n *End of (?:the )?Project Gutenberg", re.IGNORECASE)


def without_gutenberg_notes(text: str) -> str:
    """A book without what Project Gutenberg puts before and after it, and with plain line ends."""
    start = _START.search(text)
    text = text[start.end() if start else 0 :]
    end = _END.search(text)
    return text[: end.start() if end else None].replace("\r\n", "\n").strip("\n")


_MMLU_SPLITS = {"dev": "dev", "validation": "val", "test": "test"}  # the hub's name -> the authors'


def write_mmlu_layout(paths: list[Path], folder: Path) -> None:
    """MMLU's files of the hub (SPLIT-*.parquet) as its authors publish them and launch/evaluate_model.py reads them: `folder`/dev/SUBJECT_dev.csv.

    All or nothing. A folder that is there stays as it is. Raises UserError.
    """
    if folder.exists():
        log.info(f"{folder}: is there already; delete it to have it written again")
        return
    with durable.new_folder(folder) as fresh:
        for path in paths:
            split = _MMLU_SPLITS[path.name.partition("-")[0]]
            (fresh / split).mkdir()
            for subject, rows in _subjects(path).items():
                with open(fresh / split / f"{subject}_{split}.csv", "w", newline="", encoding="utf-8") as file:
                    csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    log.info(f"{folder}: MMLU in its own layout: python launch/evaluate_model.py RUN --tasks mmlu --mmlu {folder}")


def _subjects(path: Path) -> dict[str, list[list[str]]]:
    """Rows of question, four choices and letter by subject."""
    import pyarrow.parquet

    subjects = defaultdict(list)
    try:
        for row in pyarrow.parquet.read_table(path).to_pylist():
            subjects[row["subject"]].append([row["question"], *row["choices"], "ABCD"[row["answer"]]])
        if odd := [subject for subject in subjects if not subject.replace("_", "").isalnum()]:  # they become names of files
            raise ValueError(f"it has a subject called {odd[0][:80]!r}")
    except (pyarrow.ArrowException, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is not as MMLU's files were ({type(error).__name__}: {error}). Delete it and run again, or give --from.") from None
    return subjects


RECIPES = {
    "story": Recipe("TinyStories: short stories in a small vocabulary", "CDLA-Sharing-1.0", "1 GB",
                    "roneneldan/TinyStories", ("data/train-*.parquet",), options=ReadOptions(separator="<|endoftext|>")),
    "dailydialog": Recipe("DailyDialog: 13,000 everyday conversations", "CC-BY-NC-SA-4.0", "4 MB",
                          "OpenRL/daily_dialog", ("data/train-*.parquet",)),
    "chat": Recipe("UltraChat 200k: long conversations with an assistant", "MIT", "800 MB",
                   "HuggingFaceH4/ultrachat_200k", ("data/train_sft-*.parquet",)),
    "chitchat": Recipe("Synthetic-Persona-Chat: small talk between two people; dialogues of lines with --from", "CC-BY-4.0", "16 MB",
                       "google/Synthetic-Persona-Chat", ("data/Synthetic-Persona-Chat_train.csv",),
                       options=ReadOptions(format="script", separator="blank-lines")),
    "knowledge": Recipe("SQuAD: questions on paragraphs of Wikipedia; --rewrite-url has a model write whole sentences", "CC-BY-SA-4.0", "15 MB",
                        "rajpurkar/squad", ("plain_text/train-*.parquet",), options=ReadOptions(format="squad")),
    "dictionary": Recipe("Wordset: an English dictionary with examples", "CC-BY-SA-4.0", "40 MB",
                         files=tuple(f"https://raw.githubusercontent.com/wordset/wordset-dictionary/master/data/{letter}.json"
                                     for letter in "abcdefghijklmnopqrstuvwxyz"), options=ReadOptions(format="dictionary")),
    "c4": Recipe("C4, English: cleaned web pages", "ODC-BY", "305 GB", "allenai/c4", ("en/c4-train.*.json.gz",)),
    "gutenberg": Recipe("Project Gutenberg: 48,000 English books, without its notes", "public domain in the USA", "11 GB",
                        "sedthh/gutenberg_english", ("data/train-*.parquet",), change=without_gutenberg_notes),
    "books": Recipe("A folder of books of your own (--from FOLDER). Books3, which this name once meant, is no longer distributed", "yours", "yours",
                    change=without_gutenberg_notes),
    "wikipedia": Recipe("Wikipedia, English, 1 November 2023", "CC-BY-SA-3.0", "11 GB",
                        "wikimedia/wikipedia", ("20231101.en/*.parquet",)),
    "alpaca": Recipe("Alpaca: 52,000 instructions", "CC-BY-NC-4.0", "25 MB", "tatsu-lab/alpaca", ("data/train-*.parquet",),
                     options=ReadOptions(format="alpaca")),  # its rows have a ready-made text too
    "dolly": Recipe("Dolly 15k: instructions written by people", "CC-BY-SA-3.0", "13 MB", "databricks/databricks-dolly-15k", ("*.jsonl",)),
    "gsm8k": Recipe("GSM8K: word problems, worked out", "MIT", "2 MB", "openai/gsm8k", ("main/train-*.parquet",)),
    "mmlu": Recipe("MMLU: multiple choice in 57 subjects, to evaluate with; also as a folder in its own layout", "MIT", "4 MB",
                   "cais/mmlu", ("all/dev-*.parquet", "all/validation-*.parquet", "all/test-*.parquet"),
                   options=ReadOptions(format="choice"), layout=write_mmlu_layout),
    "pystdlib": Recipe("This Python's own sources: no download", "PSF", "none", local=python_standard_library, max_bytes=16_000_000),
}  # fmt: skip
