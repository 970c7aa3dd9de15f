import pytest
import torch
from eval.tiny import model, plain_score, tokenizer

from llm.eval import likelihood
from llm.eval.likelihood import encode_pair, score, windows
from llm.log import UserError

SHARED = list(range(40, 80))
PAIRS = {
    "nothing shared": [([5, 6, 7], [8]), ([9], [1, 2, 3]), (list(range(30)), [4, 4]), ([5, 6, 7], [9])],
    "a shared beginning": [([*SHARED, *range(n)], [n + 1, n + 2][: 1 + n % 2]) for n in range(6)],
    "one row for all": [([*SHARED, 7], [letter]) for letter in range(4)],
    "one pair": [([1, 2], [3])],
}


@pytest.mark.parametrize("batch_tokens", [1, 90, 8192])
@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_scores_are_those_of_one_row_at_a_time(case, batch_tokens, positions, monkeypatch):
    monkeypatch.setattr(likelihood, "CPU_BATCH_TOKENS", batch_tokens)
    ours = model(positions=positions)
    told = []
    found = score(ours, PAIRS[case], told.append)
    for one, (context, continuation) in zip(found, PAIRS[case], strict=True):
        value, greedy = plain_score(ours, context, continuation)
        assert one.log_likelihood == pytest.approx(value, abs=1e-3) and one.is_greedy is greedy
    assert sum(told) == len(PAIRS[case])


def test_a_greedy_continuation_is_known_as_one():
    ids = [1, 2, 3]
    for _ in range(3):
        ids.append(int(model()(torch.tensor([ids]))[0, -1].argmax()))
    assert [one.is_greedy for one in score(model(), [(ids[:3], ids[3:]), (ids[:3], [*ids[3:5], ids[5] + 1]), (ids[:3], [ids[3] + 1, *ids[4:]])])] == [
        True, False, False,
    ]  # fmt: skip


def test_the_head_sees_what_is_scored_and_the_blocks_see_a_shared_beginning_once(monkeypatch):
    ours, read = model(), []
    hidden = ours.hidden
    monkeypatch.setattr(ours, "hidden", lambda tokens, cache=None: read.append(tuple(tokens.shape)) or hidden(tokens, cache))
    score(ours, [([*SHARED, n, 5], [letter]) for n in range(3) for letter in range(4)])
    assert read == [(1, len(SHARED)), (3, 2)]


def test_of_a_context_that_is_too_long_the_end_is_used():
    ours, context = model(seq_len=16), list(range(50, 90))
    (found,) = score(ours, [(context, [3, 4])])
    assert found.log_likelihood == pytest.approx(plain_score(ours, context[-15:], [3, 4])[0], abs=1e-3)


def test_a_continuation_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="17 tokens cannot be scored: give 1 to 16"):
        score(model(seq_len=16), [([1], [2] * 17)])


@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 24, 29])
def test_windows_hold_each_id_once_with_as_much_before_it_as_fits(length, stride):
    ids, scored = list(range(100, 100 + length)), []
    for context, continuation in windows(ids, 0, 8, stride):
        whole = context + continuation
        assert len(whole) <= 9 and ([0, *ids][: len(whole)] == whole or len(whole) == 9)
        assert context[-1] == ([0, *ids][len(scored)])
        assert len(continuation) <= (stride if scored else 8)
        scored += continuation
    assert scored == ids


def test_a_pair_is_encoded_as_one_text_and_spaces_between_belong_to_the_continuation():
    whole = tokenizer().encode("x Answer: A").tolist()
    for context, continuation in (("x Answer:", " A"), ("x Answer: ", "A")):
        pair = encode_pair(tokenizer(), context, continuation)
        assert pair == (whole[:-1], whole[-1:])
    assert encode_pair(tokenizer(), "", "x")[0] == [tokenizer().eos_id]
