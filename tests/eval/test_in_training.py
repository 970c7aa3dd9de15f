"""Tasks measured while a run trains: what they say, and that the run does not notice."""

import json
from pathlib import Path

import pytest
from eval.tiny import tokenizer, write_mmlu
from little_run import add_shard, make_run, sit
from ranks import run_ranks

from llm.config import ConfigError, EvalConfig, load_config
from llm.dist import World
from llm.eval import perplexity
from llm.eval.in_training import Tasks, read_tasks
from llm.eval.mmlu import evaluate_subject, read_subjects
from llm.generate.load import load_run
from llm.log import UserError

SEQ_LEN, TEXT = 32, "Answer: A, or so the vu goes. "


def make_wordy_run(root: Path, stage: int) -> Path:
    """A run of 5 steps whose tokenizer knows letters, and data for its tasks."""
    path, folder = root / "letters", root / "letters-data"
    path.mkdir()
    tokenizer().save(path)
    for first in (0, 145):
        add_shard(folder, path, first, first + 145, seq_len=SEQ_LEN)
    write_mmlu(root / "mmlu", ["anatomy", "world_religions"])
    write_mmlu(root / "mmlu-of-rank-1", ["anatomy"])
    (root / "texts").mkdir()
    for name in "ab":
        (root / "texts" / f"{name}.txt").write_text(TEXT * (2 + ord(name) % 2))
    return make_run(root, seq_len=SEQ_LEN, tokenizer_path=str(path), data_path=str(folder), batch_tokens=2 * SEQ_LEN, zero_stage=stage, init_std=0.3)


def without_and_with(world: World, root: str, config: str) -> dict:
    """Two runs that differ in nothing but their tasks; what this rank measured; the message where ranks have other data."""
    measured, measure = [], Tasks.measure
    Tasks.measure = lambda *args: measured.append(measure(*args)) or measured[-1]
    tasks = ["eval.tasks=[mmlu, perplexity]", "eval.every=3", "eval.shots=1", f"eval.mmlu={root}/mmlu", f"eval.texts=[{root}/texts]"]
    runs = [sit(world, config, [f"run_name={name}", *more]) for name, more in (("without", []), ("with", tasks))]
    try:
        read_tasks(EvalConfig(tasks=["mmlu"], mmlu=f"{root}/mmlu" + f"-of-rank-{world.rank}" * world.rank), world)
        refused = ""
    except UserError as error:
        refused = str(error)
    return {"runs": runs, "measured": measured, "refused": refused}


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_a_run_with_tasks_ends_in_the_same_bits_and_measures_what_the_command_measures(tmp_path, ranks, stage):
    config = make_wordy_run(tmp_path, stage)
    found = run_ranks(without_and_with, ranks, tmp_path, str(tmp_path), str(config))
    for rank in found:
        assert rank["runs"][0] == rank["runs"][1] and rank["runs"][0]["step"] == 5
        assert rank["measured"] == found[0]["measured"] and len(rank["measured"]) == 2
        assert ("other content on rank 1" in rank["refused"]) is (ranks == 2)
    states = [sorted((tmp_path / "checkpoints" / run).glob("step-*/rank-*.json")) for run in ("without", "with")]
    without, with_tasks = ([path.read_bytes() for path in paths] for paths in states)
    assert without == with_tasks and len(without) == ranks  # states of random number generators

    run = load_config(config, ["run_name=with"]).run_folder
    records = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    told = {record["step"]: record for record in records if any(key.startswith("eval/") for key in record)}
    assert set(told) == {3, 5}
    assert {key.removeprefix("eval/"): value for key, value in told[5].items() if key.startswith("eval/")} == found[0]["measured"][-1]
    model, its_tokenizer, _ = load_run(run)
    values = found[0]["measured"][-1]
    for subject, category in zip(read_subjects(tmp_path / "mmlu", shots=1), ("STEM", "humanities"), strict=True):
        part = evaluate_subject(model, its_tokenizer, subject, 1)
        assert values[f"mmlu-1-shot/{category}"] == sum(part["correct"]) / len(part["correct"])
    assert values["mmlu-1-shot/cut"] > 0 and values["mmlu-1-shot/fewer_shots"] > 0
    by_hand = perplexity.of_text(model, its_tokenizer, [path.read_text() for path in sorted((tmp_path / "texts").iterdir())])
    for metric in ("loss", "perplexity", "bits_per_byte"):
        assert values[f"perplexity/{tmp_path}/texts/{metric}"] == pytest.approx(by_hand[metric], rel=1e-5)


def test_the_limit_counts_questions_of_each_subject_and_documents_of_each_text(tmp_path):
    write_mmlu(tmp_path, ["anatomy", "world_religions"])
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(9)))
    tasks = read_tasks(EvalConfig(tasks=["mmlu", "perplexity"], limit=3, mmlu=str(tmp_path), texts=[str(tmp_path / "lines.jsonl")]), World())
    assert [len(subject.questions) for subject in tasks.subjects] == [3, 3]
    assert tasks.texts == {str(tmp_path / "lines.jsonl"): ["line 0", "line 1", "line 2"]}


@pytest.mark.parametrize(("wrong", "said"), [
    ({"tasks": ["mmlu"], "mmlu": "nowhere"}, "nowhere: holds no subject of MMLU"),
    ({"tasks": ["mmlu"], "subjects": ["alchemy"]}, "has no subject alchemy"),
    ({"tasks": ["mmlu"], "shots": 5}, "has 2 examples for 5 shots"),
    ({"tasks": ["perplexity"]}, "give eval.texts"),
    ({"tasks": ["perplexity"], "texts": ["nowhere.txt"]}, "nowhere.txt"),
    ({"tasks": ["perplexity"], "texts": ["empty.txt"]}, "empty.txt holds no text to measure"),
])  # fmt: skip
def test_what_is_wrong_with_the_data_of_a_task_is_told_before_the_first_step(tmp_path, monkeypatch, wrong, said):
    monkeypatch.chdir(tmp_path)
    write_mmlu(tmp_path / "mmlu", ["anatomy"])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=said):
        read_tasks(EvalConfig(**{"mmlu": "mmlu"} | wrong), World())


def test_an_unknown_task_is_refused_by_its_name(tmp_path):
    with pytest.raises(ConfigError, match="eval.tasks.0 is 'mmul', but should be 'mmlu' or 'perplexity'"):
        load_config(make_run(tmp_path), ["eval.tasks=[mmul]"])
