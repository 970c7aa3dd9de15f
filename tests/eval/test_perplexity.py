import json
import math

import pytest
from eval.tiny import model, plain_score, tokenizer
from little_run import make_run, sit_alone

from llm.config import load_config
from llm.eval import perplexity
from llm.generate.load import load_run
from llm.log import UserError

TEXT = "Answer: A, or so the déjà vu goes. " * 3


def test_shards_give_the_numbers_of_the_validation_in_training(tmp_path):
    config = make_run(tmp_path)
    sit_alone(tmp_path, config)
    run = load_config(config).run_folder
    records = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "val/loss" in record][-1]
    ours, its_tokenizer, checkpoint = load_run(run)
    assert trained["step"] == checkpoint.manifest.step
    found = perplexity.of_shards(ours, its_tokenizer, [tmp_path / "data"])
    assert found["loss"] == pytest.approx(trained["val/loss"], abs=1e-5)
    assert found["bits_per_byte"] == pytest.approx(trained["val/bits_per_byte"], abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(trained["val/loss"]), rel=1e-4)
    assert perplexity.is_shards(tmp_path / "data") and not perplexity.is_shards(tmp_path)


def test_a_text_in_one_window_is_scored_behind_an_end_of_text_with_all_of_its_bytes():
    ids = tokenizer().encode(TEXT).tolist()
    nats = -plain_score(model(), [tokenizer().eos_id], ids)[0]
    found = perplexity.of_text(model(), tokenizer(), [TEXT])
    assert (found["tokens"], found["bytes"]) == (len(ids), len(TEXT.encode()))
    assert found["loss"] == pytest.approx(nats / len(ids)) and found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()))


@pytest.mark.parametrize("stride", [5, 16])
def test_longer_texts_are_scored_window_by_window_and_summed(stride, monkeypatch):
    monkeypatch.setattr(perplexity, "WINDOWS_AT_A_TIME", 2)
    ours, nats, n_tokens = model(seq_len=16), 0.0, 0
    for text in (TEXT, TEXT[::-1]):
        ids = [tokenizer().eos_id, *tokenizer().encode(text).tolist()]
        starts = [1, *range(17, len(ids), stride)]
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            nats -= plain_score(ours, ids[max(0, stop - 17) : start], ids[start:stop])[0]
        n_tokens += len(ids) - 1
    found = perplexity.of_text(ours, tokenizer(), [TEXT, TEXT[::-1]], stride)
    assert found["tokens"] == n_tokens and found["loss"] == pytest.approx(nats / n_tokens)


def test_no_text_is_refused():
    with pytest.raises(UserError, match="holds no characters"):
        perplexity.of_text(model(), tokenizer(), [])


def test_a_model_that_is_beyond_all_measure_has_an_infinite_perplexity_and_no_overflow():
    assert perplexity.named(1000.0, 1, 4)["perplexity"] == math.inf and perplexity.named(math.inf, 1, 4)["loss"] == math.inf
