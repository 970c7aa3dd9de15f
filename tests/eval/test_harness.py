"""lm-evaluation-harness on our model; skipped where the extra `eval` is not installed."""

import json

import pytest
from eval.tiny import model, plain_score, tokenizer, write_mmlu

pytest.importorskip("lm_eval", reason='needs pip install "tally-llm[eval]"')

from lm_eval.api.instance import Instance

from llm.eval.harness import HarnessModel, find_data, metrics, run_tasks
from llm.eval.harness import write_mmlu as as_task_data
from llm.eval.mmlu import evaluate_subject, read_subjects
from llm.log import UserError


def requests(kind: str, *arguments) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def write_tasks(folder):
    arc = {"question": "Q", "choices": {"text": ["x", "yes indeed"], "label": ["A", "B"]}, "answerKey": "B"}
    gsm = {"question": "1+1?", "answer": "It is 2.\n#### 2"}
    swag = {"ctx_a": "He", "ctx_b": "then", "activity_label": "Act", "endings": ["goes.", "sings.", "sits.", "eats."], "label": "1", "ind": 0}
    for path, row in (("arc_easy/test.jsonl", arc), ("hellaswag/validation.jsonl", swag), ("gsm8k/train.jsonl", gsm), ("gsm8k/test.jsonl", gsm)):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text((json.dumps(row) + "\n") * 6)
    return folder


def test_the_harness_finds_our_mmlu_answers_and_runs_tasks_on_local_files(tmp_path):
    subjects = read_subjects(write_mmlu(tmp_path / "mmlu", ["anatomy", "world_religions"]), shots=1)
    (tmp_path / "converted").mkdir()
    ours = HarnessModel(model(), tokenizer())
    found = run_tasks(ours, as_task_data(subjects, tmp_path / "converted"), shots=1)
    for subject in subjects:
        mine = evaluate_subject(model(), tokenizer(), subject, 1)
        samples = sorted(found["samples"][f"mmlu_{subject.name}"], key=lambda sample: sample["doc_id"])
        assert [sample["arguments"][0][0] for sample in samples] == [subject.prompt(q, 1) for q in subject.questions]
        assert ["ABCD"[max(range(4), key=lambda i: float(s["filtered_resps"][i][0]))] for s in samples] == list(mine["answers"])
        assert [int(sample["acc"]) for sample in samples] == mine["correct"]
        accuracy, stderr = metrics(found, f"mmlu_{subject.name}")["acc"]
        assert accuracy == sum(mine["correct"]) / len(subject.questions) and 0 < stderr < 0.3

    found = run_tasks(ours, find_data(write_tasks(tmp_path), ["arc_easy", "gsm8k"]))
    assert metrics(found, "arc_easy").keys() == {"acc", "acc_norm"}
    assert metrics(found, "gsm8k").keys() == {"exact_match strict-match", "exact_match flexible-extract"}


def test_a_rolling_likelihood_is_that_of_the_whole_text():
    ids = tokenizer().encode("Answer: A, said he").tolist()
    (found,) = HarnessModel(model(), tokenizer()).loglikelihood_rolling(requests("loglikelihood_rolling", ("Answer: A, said he",)))
    assert found == pytest.approx(plain_score(model(), [tokenizer().eos_id], ids)[0])


def test_generated_text_ends_before_the_first_stop():
    ours = HarnessModel(model(), tokenizer())
    (free,) = ours.generate_until(requests("generate_until", ("Answer:", {"until": [], "max_gen_toks": 12})))
    stops = [free[8:10], free[5:7]]
    (stopped,) = ours.generate_until(requests("generate_until", ("Answer:", {"until": stops, "max_gen_toks": 12})))
    assert stopped == free[: min(free.find(stop) for stop in stops)] and 0 < len(stopped) < len(free)


def test_missing_data_and_unknown_tasks_are_named(tmp_path):
    with pytest.raises(UserError, match="no data for task hellaswag"):
        find_data(tmp_path, ["hellaswag"])
    with pytest.raises(UserError, match="arc_of_noah: .* has no such task"):
        run_tasks(HarnessModel(model(), tokenizer()), {"arc_of_noah": {"test": tmp_path / "x.jsonl"}})
    write_tasks(tmp_path)
    (tmp_path / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(UserError, match="gsm8k: needs a split or field 'train', but there are .*test.jsonl"):
        run_tasks(HarnessModel(model(), tokenizer()), find_data(tmp_path, ["gsm8k"]))


@pytest.mark.parametrize(("task", "content", "said"), [
    ("arc_easy", '{"bad": 1}', "'question' is undefined"), ("arc_easy", '{"bad', "JSON"), ("hellaswag", '{"bad": 1}', "needs a split or field"),
])  # fmt: skip
def test_data_that_do_not_fit_their_task_are_named(tmp_path, task, content, said):
    for path in (write_tasks(tmp_path) / task).iterdir():
        path.write_text(content + "\n")
    with pytest.raises(UserError, match=f"{task}: .*{said}.*{task}/.*jsonl"):
        run_tasks(HarnessModel(model(), tokenizer()), find_data(tmp_path, [task]))
