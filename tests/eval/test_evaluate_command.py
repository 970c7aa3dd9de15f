"""launch/evaluate_model.py, called as the script's own main."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from eval.tiny import model, tokenizer, write_mmlu
from generate.test_generate_run import save_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm.eval.results import Kept, Results
from llm.log import UserError

SCRIPT = Path(__file__).parents[2] / "launch" / "evaluate_model.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "toy"
    for step in (1, 2):
        save_model(folder, step, model(), tokenizer())
    return folder


def evaluate(*words) -> None:
    spec = importlib.util.spec_from_file_location("evaluate_model", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before, sys.argv = sys.argv, [str(SCRIPT), *map(str, words)]
    try:
        script.main()
    finally:
        sys.argv = before


def test_tables_json_and_tensorboard_say_the_same_and_a_second_run_goes_on(run, tmp_path, capsys):
    folder = write_mmlu(tmp_path / "mmlu", ["anatomy", "world_religions"])
    text = tmp_path / "some.txt"
    text.write_text("Answer: A\n" * 9)
    words = [run, "--mmlu", folder, "--device", "cpu", "--text", text]
    evaluate(*words, "--tasks", "mmlu", "--subjects", "anatomy")
    evaluate(*words, "--tasks", "mmlu,perplexity")
    said = capsys.readouterr().out
    assert "1 of 2 subjects were there from before" in said and "some.txt" in said and "macro" in said
    results = json.loads((run / "evaluations" / "step-000000002-a1" / "results.json").read_text())
    assert results["mmlu-0-shot"].keys() == {f"{n}{s}" for n in ("STEM", "humanities", "all", "macro") for s in ("", "_stderr")}
    assert results[f"perplexity/{text}"]["bytes"] == 90 and f"{results['mmlu-0-shot']['all']:.2%}" in said
    board = EventAccumulator(str(run / "logs" / "tensorboard"))
    board.Reload()
    (*_, last) = board.Scalars("eval/mmlu-0-shot/macro")
    assert last.step == 2 and last.value == pytest.approx(results["mmlu-0-shot"]["macro"])


def test_another_checkpoint_is_not_taken_for_the_one_that_was_evaluated(run, tmp_path, capsys):
    folder, other = write_mmlu(tmp_path / "mmlu", ["virology"]), tmp_path / "other"
    save_model(other, 1, model(n_layers=1), tokenizer())
    for path, step in ((run, 1), (run, 2), (other, 1)):
        evaluate(path, "--tasks", "mmlu", "--mmlu", folder, "--step", step, "--out", tmp_path / "out")
    assert "from before" not in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("step-*/results.json"))) == 2


MISTAKES = {
    "no text for perplexity": (["--tasks", "perplexity"], "give --text"),
    "a text that is not there": (["--tasks", "perplexity", "--text", "nowhere.txt"], "nowhere.txt: does not exist"),
    "no tasks": (["--tasks", ","], "--tasks is empty"),
    "negative shots": (["--tasks", "mmlu", "--shots", "-1"], "--shots is -1"),
    "no MMLU there": (["--tasks", "mmlu", "--mmlu", "nowhere"], "nowhere: holds no subject of MMLU"),
    "nowhere to write": (["--tasks", "perplexity", "--text", SCRIPT, "--out", SCRIPT], "cannot be written"),
    "no stride": (["--tasks", "perplexity", "--text", SCRIPT, "--stride", "0"], "--stride is 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_is_computed(run, mistake):
    words, said = MISTAKES[mistake]
    with pytest.raises(UserError, match=said):
        evaluate(run, *words)


@pytest.mark.parametrize("blocked", ["results.json", "mmlu-0-shot.json", "tensorboard"])
def test_results_that_can_no_longer_be_written_are_told_in_words(tmp_path, blocked):
    results = Results(tmp_path / "out", tmp_path / "tensorboard", 1)
    if blocked == "tensorboard":
        (tmp_path / blocked).touch()
    else:
        (tmp_path / "out" / blocked).mkdir()
    with pytest.raises(UserError, match=f"{blocked}: cannot be written .* give --out FOLDER"):
        Kept(tmp_path / "out", "mmlu-0-shot").get("anatomy", [], lambda: {"correct": [1]})
        results.add("mmlu", {"acc": 1.0})
