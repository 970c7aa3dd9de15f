"""Tasks of lm-evaluation-harness (ARC, HellaSwag, GSM8K, its own MMLU, ...) on our models and on files of yours. Needs the extra `eval`.

Nothing is fetched: a task's data are FOLDER/TASK/SPLIT.jsonl or .parquet, with the fields that the task's data set has.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
except ImportError as error:
    from llm.log import UserError

    raise UserError(f'{error.name} is not installed, and tasks other than mmlu and perplexity need it: pip install "tally-llm[eval]".') from None

from llm.eval.likelihood import encode_pair, score, windows
from llm.eval.mmlu import LETTERS, Subject
from llm.generate.generator import Writing
from llm.generate.sampling import Sampling
from llm.log import UserError, progress
from llm.model.transformer import Transformer
from llm.tokenizer.protocol import Tokenizer

FORMATS = {".jsonl": "json", ".parquet": "parquet"}
MAX_NEW_TOKENS = 256  # where a task does not say


class HarnessModel(LM):
    """One of our models as lm-evaluation-harness wants it."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer):
        super().__init__()
        self.model, self.own_tokenizer = model, tokenizer

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        pairs = [encode_pair(self.own_tokenizer, *request.args) for request in requests]
        with progress(len(pairs), "scoring", "answers") as bar:
            return [tuple(found) for found in score(self.model, pairs, bar.advance)]

    def loglikelihood_rolling(self, requests) -> list[float]:
        totals = []
        for request in requests:
            ids = self.own_tokenizer.encode(request.args[0]).tolist()
            pairs = list(windows(ids, self.own_tokenizer.eos_id, self.model.cfg.seq_len, self.model.cfg.seq_len))
            totals.append(sum(found.log_likelihood for found in score(self.model, pairs)))
        return totals

    def generate_until(self, requests) -> list[str]:
        texts = []
        with progress(len(requests), "generating", "answers") as bar:
            for request in requests:
                texts.append(self._generate(*request.args))
                bar.advance(1)
        return texts

    def _generate(self, context: str, wishes: dict) -> str:
        stops = [wishes["until"]] if isinstance(wishes.get("until"), str) else wishes.get("until") or []
        max_tokens = wishes.get("max_gen_toks", MAX_NEW_TOKENS)
        sampling = Sampling(wishes.get("temperature", 0.0) if wishes.get("do_sample") else 0.0, wishes.get("top_k"), wishes.get("top_p"))
        seq_len = self.model.cfg.seq_len
        ids = self.own_tokenizer.encode(context)[-max(seq_len - max_tokens, seq_len // 2) :]  # room to answer while all of it is in view
        return "".join(Writing(self.model, self.own_tokenizer, ids, max_tokens=max_tokens, sampling=sampling, seed=0, stop=stops))


def run_tasks(lm: LM, task_files: dict[str, dict[str, Path]], shots: int | None = None) -> dict:
    """What the harness returns for these tasks: "results", "samples" and more. `task_files`: task -> split -> data file.

    `shots` None: as many as each task has by itself.
    """
    with tempfile.TemporaryDirectory() as folder, _quiet():
        manager = TaskManager(include_defaults=False)  # reading all of the harness's thousands of task files takes most of a minute
        tasks = [_load(manager, name, files, Path(folder)) for name, files in task_files.items()]
        return lm_eval.simple_evaluate(lm, tasks=tasks, num_fewshot=shots, task_manager=manager, bootstrap_iters=100, log_samples=True)


def metrics(found: dict, task: str) -> dict[str, tuple[float, float]]:
    """Metric -> (value, standard error) of one task of `run_tasks`."""
    values, pairs = found["results"][task], {}
    for key, value in values.items():
        metric, _, how = key.partition(",")  # "exact_match,strict-match": how the answer was cut out of the text
        if isinstance(value, float) and not metric.endswith("_stderr"):
            stderr = values.get(f"{metric}_stderr,{how}")
            pairs[metric if how == "none" else f"{metric} {how}"] = value, stderr if isinstance(stderr, float) else float("nan")
    return pairs


def find_data(folder: Path, tasks: list[str]) -> dict[str, dict[str, Path]]:
    """The data files of tasks in FOLDER/TASK/SPLIT.jsonl or .parquet."""
    found = {task: {path.stem: path for path in sorted((folder / task).glob("*")) if path.suffix in FORMATS} for task in tasks}
    if missing := [task for task, files in found.items() if not files]:
        raise UserError(
            f"{folder / missing[0]}: holds no data for task {missing[0]}. Put its splits there, as train.jsonl, validation.jsonl, test.jsonl "
            f"or .parquet with the fields of its data set; --task-data names another folder."
        )
    return found


def write_mmlu(subjects: list[Subject], folder: Path) -> dict[str, dict[str, Path]]:
    """Our subjects as data files of the harness's own tasks mmlu_SUBJECT. JSON: its CSV reader would make numbers of some choices."""
    found = {}
    for subject in subjects:
        files = {"dev": subject.examples, "test": subject.questions}
        found[f"mmlu_{subject.name}"] = {split: folder / f"{subject.name}-{split}.jsonl" for split in files}
        for split, questions in files.items():
            rows = ({"question": q.text, "choices": q.choices, "answer": LETTERS.index(q.answer)} for q in questions)
            (folder / f"{subject.name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return found


def _load(manager: TaskManager, name: str, files: dict[str, Path], folder: Path) -> Task:
    """The harness's own task with our files instead of the hub's."""
    formats = {path.suffix for path in files.values()}
    if len(formats) > 1:
        raise UserError(f"{name}: its splits are files of different formats ({', '.join(map(str, files.values()))}). Use one.")
    task = {
        "include": str(_own_file(name)),
        "dataset_path": FORMATS[formats.pop()],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(path.resolve()) for split, path in files.items()}, "cache_dir": str(folder / "cache")},
    }
    task |= {key: None for key, split in (("training_split", "train"), ("validation_split", "validation")) if split not in files}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    try:
        (loaded,) = manager.load(str(path))["tasks"].values()
    except Exception as error:  # datasets', jinja2's or a KeyError of the task's own code: it is the files that do not fit
        what = f"needs a split or field {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error.__cause__ or error}"
        raise UserError(f"{name}: {what}, but there are {', '.join(map(str, files.values()))}. docs/evaluate.md tells how they should be.") from None
    return loaded


def _own_file(name: str) -> Path:
    named = re.compile(rf"""^"?task"?: *["']?{re.escape(name)}["']? *$""", re.MULTILINE)
    for path in sorted(Path(lm_eval.tasks.__file__).parent.rglob(f"{name}.yaml")):
        if named.search(path.read_text(encoding="utf-8")):
            return path
    raise UserError(f"{name}: lm-evaluation-harness {lm_eval.__version__} has no such task in a file of its own. `lm-eval ls tasks` lists them.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the chatter and the bars of the harness and of datasets; ours go to standard output."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        loud = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
        levels = [logger.level for logger in loud]
        for logger in loud:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loud, levels, strict=True):
                logger.setLevel(level)
