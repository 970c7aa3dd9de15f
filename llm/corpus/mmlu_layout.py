"""MMLU's files of the hub as the folder of CSV files that its authors publish, and that launch/evaluate_model.py reads."""

import csv
import shutil
from collections import defaultdict
from pathlib import Path

from llm import durable
from llm.log import UserError, log

SPLITS = {"dev": "dev", "validation": "val", "test": "test"}  # the hub's name -> the authors'


def write_layout(paths: list[Path], folder: Path) -> None:
    """`folder`/dev/SUBJECT_dev.csv and so on, of SPLIT-*.parquet; all or nothing. A folder that is there stays as it is. Raises UserError."""
    if folder.exists():
        log.info(f"{folder}: is there already; delete it to have it written again")
        return
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for path in paths:
            split = SPLITS[path.name.partition("-")[0]]
            (temporary / split).mkdir(parents=True)
            for subject, rows in _subjects(path).items():
                with open(temporary / split / f"{subject}_{split}.csv", "w", newline="", encoding="utf-8") as file:
                    csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    durable.fsync_folder(folder.parent)
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
