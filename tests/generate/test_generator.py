import pytest
import torch
import torch.nn.functional as F

from llm.config import ModelConfig
from llm.eval import perplexity
from llm.eval.likelihood import score
from llm.generate.generator import generate_rows, prompt_ids, stream_text
from llm.generate.sampling import Sampling
from llm.model.init import build_model
from llm.tokenizer.train import train_bpe

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["plain bytes"], vocab_size=256).tokenizer  # a token for each byte, and the special ones


def little_model(tokenizer, seq_len: int = 16):
    cfg = ModelConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=seq_len, init_std=0.3)
    return build_model(cfg.with_vocab(tokenizer.vocab_size), 1).eval()


def continued(model, tokenizer, prompt, n, sampling=GREEDY, seed=1, stop_ids=()):
    rows = generate_rows(model, tokenizer, [prompt], max_tokens=n, sampling=sampling, seed=seed, stop_ids=stop_ids)
    return [token for _, token in rows]


@torch.no_grad()
def test_greedy_text_is_what_the_full_forward_finds_likeliest(tokenizer):
    model, ids = little_model(tokenizer), [1, 2, 3]
    new = continued(model, tokenizer, ids, 13)
    for chosen in new:
        assert chosen == model(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].argmax()
        ids.append(chosen)
    assert len(new) == 13


@pytest.fixture
def cudnn_seen(monkeypatch) -> list[bool]:
    """Whether cuDNN might have computed each call of attention."""
    seen, attention = [], F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return seen


def test_text_is_written_without_cudnn_whose_plans_are_for_one_length_and_between_tokens_all_is_as_before(tokenizer, cudnn_seen):
    model = little_model(tokenizer)
    rows = generate_rows(model, tokenizer, [[1, 2, 3], [4]], max_tokens=5, sampling=GREEDY, seed=1)
    assert [torch.backends.cuda.cudnn_sdp_enabled() for _ in rows] == [True] * 10
    assert len(cudnn_seen) == 2 * 7 and not any(cudnn_seen)
    model(torch.tensor([[1, 2, 3]]))
    assert cudnn_seen[-2:] == [True, True]  # as in training


def test_answers_are_scored_without_cudnn(tokenizer, cudnn_seen):
    model = little_model(tokenizer)
    score(model, [([1, 2, 3], [4]), ([1, 2, 3, 5], [6, 7]), ([9], [1])])
    perplexity.text_sums(model, tokenizer, ["some text", "more than a row of text"])
    assert len(cudnn_seen) >= 6 and not any(cudnn_seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()


@torch.no_grad()
def test_past_the_context_it_goes_on_from_the_last_half(tokenizer):
    model = little_model(tokenizer, seq_len=8)
    new = continued(model, tokenizer, [1, 2, 3], 12)
    written = [1, 2, 3, *new]
    assert len(new) == 12
    assert new[6] == model(torch.tensor([written[5:9]]))[0, -1, : tokenizer.vocab_size].argmax()  # 9 tokens do not fit: the last 4 are read


def test_a_prompt_longer_than_the_context_is_cut_from_the_left(tokenizer):
    model = little_model(tokenizer)
    assert continued(model, tokenizer, range(40), 5) == continued(model, tokenizer, range(24, 40), 5)


def test_a_prompt_of_no_tokens_is_where_a_text_begins(tokenizer):
    model = little_model(tokenizer)
    assert continued(model, tokenizer, [], 5) == continued(model, tokenizer, [tokenizer.eos_id], 5)


def test_the_seed_decides_the_text(tokenizer):
    model, sampling = little_model(tokenizer), Sampling(temperature=1.0)
    first = continued(model, tokenizer, [1], 30, sampling, seed=5)
    assert first == continued(model, tokenizer, [1], 30, sampling, seed=5)
    assert first != continued(model, tokenizer, [1], 30, sampling, seed=6)


def test_a_seed_of_any_size_gives_its_own_text(tokenizer):
    model = little_model(tokenizer)
    texts = [continued(model, tokenizer, [1], 30, Sampling(temperature=1.0), seed) for seed in (5, -5, 2**63 - 1, 10**30)]
    assert len(set(map(tuple, texts))) == 4


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=5.0)], ids=["greedy", "hot"])
def test_columns_that_only_pad_the_vocabulary_never_win(tokenizer, sampling):
    model = little_model(tokenizer)
    assert model.cfg.vocab_size > tokenizer.vocab_size
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size :] = 50 * model.head.weight[:1]
        model.head.weight[tokenizer.vocab_size + 1 :] *= -1  # one of the two is huge at every position
    assert max(continued(model, tokenizer, [1], 60, sampling)) < tokenizer.vocab_size


def test_end_of_text_ends_it_and_is_not_shown(tokenizer):
    model = little_model(tokenizer)
    greedy = continued(model, tokenizer, [1, 2, 3], 8)
    tokenizer_like = _EndsAt(tokenizer, greedy[5])
    assert continued(model, tokenizer_like, [1, 2, 3], 8) == greedy[: greedy.index(greedy[5])]


class _EndsAt:
    def __init__(self, tokenizer, eos_id: int):
        self.vocab_size, self.eos_id = tokenizer.vocab_size, eos_id


def test_a_stop_token_ends_it_too(tokenizer):
    model, prompt = little_model(tokenizer), [1, 2, 3]
    greedy = continued(model, tokenizer, prompt, 8)
    stopped = continued(model, tokenizer, prompt, 8, stop_ids=(greedy[5],))
    assert stopped == greedy[: greedy.index(greedy[5])]


def test_names_in_a_prompt_are_special_tokens_only_when_asked_for(tokenizer):
    text, ids = "a<|im_end|>\n<|im_start|>b", tokenizer.special_ids
    assert prompt_ids(tokenizer, text, special_tokens=False) == tokenizer.encode(text).tolist()
    a, newline, b = (int(tokenizer.encode(letter)[0]) for letter in "a\nb")
    assert prompt_ids(tokenizer, text, special_tokens=True) == [a, ids["<|im_end|>"], newline, ids["<|im_start|>"], b]


def test_streaming_never_breaks_a_character(tokenizer):
    text = "naïve 😀 日本 é"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())  # every character but ASCII is spread over tokens
    pieces = list(stream_text(tokenizer, ids))
    assert pieces == list(text)


def test_streaming_shows_a_character_that_was_never_finished_as_a_replacement(tokenizer):
    assert list(stream_text(tokenizer, tokenizer.encode("a😀")[:-1])) == ["a", "\ufffd"]


def test_streaming_is_lazy(tokenizer):
    asked = []

    def ids():
        for i in tokenizer.encode("ab"):
            asked.append(i)
            yield i

    assert next(stream_text(tokenizer, ids())) == "a"
    assert len(asked) == 1
