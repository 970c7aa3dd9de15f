"""Many prompts at once, stops, and the filters of sampling."""

import json

import pytest
import torch
from test_generate_run import generate, run  # noqa: F401 - a fixture
from test_generator import continued, little_model, tokenizer  # noqa: F401 - a fixture

from llm.generate.generator import Writing, generate_rows, until_stop, visible
from llm.generate.sampling import Sampling, pick

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [1], [2, 3, 4], list(range(40))]


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, top_k=20, repetition_penalty=1.2)], ids=["greedy", "drawn"])
def test_each_row_of_a_batch_is_what_it_would_be_alone(tokenizer, sampling):  # noqa: F811
    model, rows = little_model(tokenizer), [[] for _ in PROMPTS]
    for row, token in generate_rows(model, tokenizer, PROMPTS, max_tokens=30, sampling=sampling, seed=4):
        rows[row].append(token)
    assert rows == [continued(model, tokenizer, prompt, 30, sampling, seed=4 + r) for r, prompt in enumerate(PROMPTS)]
    assert max(map(len, rows)) == 30  # contexts of 16: it has been past them


def test_a_row_that_stops_early_leaves_the_others_as_they_were(tokenizer):  # noqa: F811
    model = little_model(tokenizer)
    alone = [continued(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    stop, rows = alone[1][3], [[] for _ in PROMPTS]
    for row, token in generate_rows(model, tokenizer, PROMPTS, max_tokens=12, sampling=Sampling(0), seed=1, stop_ids={stop}):
        rows[row].append(token)
    assert rows == [ids[: ids.index(stop)] if stop in ids else ids for ids in alone]


def test_a_text_knows_why_it_ended(tokenizer):  # noqa: F811
    model, how = little_model(tokenizer), dict(sampling=Sampling(0), seed=1)
    greedy = continued(model, tokenizer, [1, 2], 6)
    whole = Writing(model, tokenizer, [1, 2], max_tokens=6, **how)
    text = "".join(whole)
    assert (text, whole.n_tokens, whole.finish_reason) == (tokenizer.decode(greedy), 6, "length")
    cut = Writing(model, tokenizer, [1, 2], max_tokens=6, stop_ids={greedy[2]}, **how)
    assert "".join(cut) == tokenizer.decode(greedy[: greedy.index(greedy[2])]) and cut.finish_reason == "stop"
    stopped = Writing(model, tokenizer, [1, 2], max_tokens=6, stop=[text[1:3]], **how)
    assert "".join(stopped) == text[: text.index(text[1:3])] and stopped.finish_reason == "stop"


@pytest.mark.parametrize(("pieces", "stops", "shown"), [
    (["ab", "cd"], [], ["ab", "cd"]), (["ab", "cEN", "D", "more"], ["END"], ["ab", "c"]), (["aE", "Nx"], ["END"], ["a", "ENx"]),
    (["aEN"], ["END"], ["a", "EN"]), (["END"], ["END"], []), (["x and y"], ["y", "and"], ["x "]), (["aa", "ab"], ["aab"], ["a"]),
])  # fmt: skip
def test_text_ends_before_a_stop_and_holds_back_no_more_than_its_beginning(pieces, stops, shown):
    assert list(until_stop(pieces, stops)) == shown


def test_min_p_keeps_what_is_near_the_likeliest():
    logits, generator = torch.tensor([0.1, 0.4, 0.2, 0.3]).log(), torch.Generator().manual_seed(1)
    assert {pick(logits, Sampling(1, min_p=0.45), generator) for _ in range(200)} == {1, 2, 3}
    assert {pick(logits, Sampling(1, min_p=1.0), generator) for _ in range(20)} == {1}


@pytest.mark.parametrize(("logits", "written", "chosen"), [([2.0, 1.9, 0.1], [0], 1), ([-1.0, -1.1, -5.0], [0, 0, 99], 1), ([2.0, 1.9, 0.1], [], 0)])
def test_the_repetition_penalty_lowers_what_is_written_already_whatever_its_sign(logits, written, chosen):
    assert pick(torch.tensor(logits), Sampling(0, repetition_penalty=1.3), torch.Generator(), written) == chosen


def test_control_characters_reach_no_terminal():
    assert visible("a\x1b[2Jb\x9b\n\tü") == "a␛[2Jb\ufffd\n\tü"


def test_many_prompts_become_json_lines_in_their_order_and_mistakes_are_told(run, tmp_path):  # noqa: F811
    prompts, output = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('"longer\u2028prompt"\n{"prompt": "b"}\n{"text": "cc"}\n')  # a line break for some, but not in JSON
    done = generate(run, "--prompts", prompts, "--max-tokens", 5, "--temp", 0, "--device", "cpu", "--batch-size", 2, "--output", output, "--verbose")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    assert [r["prompt"] for r in records] == ["longer\u2028prompt", "b", "cc"]
    alone = generate(run, "--prompt", "b", "--max-tokens", 5, "--temp", 0, "--device", "cpu").stdout.split("\n", 1)[1]
    assert "b" + records[1]["text"] + "\n" == alone and "tokens in" in done.stdout
    for words, said in ((["--chat"], "launch/chat.py"), (["--prompt", "a", "--stop", ""], "--stop is empty")):
        refused = generate(run, *words)
        assert refused.returncode == 2 and said in refused.stderr
