import pytest
import torch

from llm.generate.sampling import Sampling, pick
from llm.log import UserError

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def drawn(sampling: Sampling, n: int = 2000) -> torch.Tensor:
    """How often each id comes out of n draws."""
    generator = torch.Generator().manual_seed(1)
    return torch.bincount(torch.tensor([pick(LOGITS, sampling, generator) for _ in range(n)]), minlength=4) / n


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-40, 1e-8])
def test_zero_temperature_or_next_to_none_takes_the_likeliest(temperature):
    assert drawn(Sampling(temperature), 20).tolist() == [0, 1, 0, 0]


def test_temperature_one_draws_by_probability():
    torch.testing.assert_close(drawn(Sampling(temperature=1)), LOGITS.exp(), atol=0.03, rtol=0)


def test_a_lower_temperature_sharpens():
    expected = (LOGITS / 0.5).softmax(0)
    torch.testing.assert_close(drawn(Sampling(temperature=0.5)), expected, atol=0.03, rtol=0)


def test_top_k_keeps_the_k_likeliest_in_proportion():
    torch.testing.assert_close(drawn(Sampling(1, top_k=2)), torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=0.03, rtol=0)


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert (drawn(Sampling(1, top_k=99)) > 0).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.05, [1]), (0.4, [1]), (0.41, [1, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_top_p_keeps_the_fewest_that_reach_it(top_p, kept):
    assert drawn(Sampling(1, top_p=top_p)).nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(("wrong", "named"), [
    ({"temperature": -1}, "temperature is -1"), ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_k": 0}, "top-k is 0"), ({"top_p": 0}, "top-p is 0"), ({"top_p": 1.5}, "top-p is 1.5"),
    ({"repetition_penalty": 1e-45}, "repetition-penalty is 1e-45"),
])  # fmt: skip
def test_a_setting_out_of_range_is_refused_with_its_value(wrong, named):
    with pytest.raises(UserError, match=named):
        Sampling(**wrong)
