import numpy as np
import pytest

from llm.data.permutation import Permutation

LARGE = [1_000_003, 488_281_250, 805_306_375]


def test_check_values_of_the_note():
    assert Permutation(10, 7, "s0", 0)(np.arange(10)).tolist() == [9, 1, 8, 7, 4, 2, 5, 3, 6, 0]
    assert Permutation(488_281_250, 7, "s0", 0)(np.arange(4)).tolist() == [360758715, 107392499, 146925924, 95687325]


def test_every_small_size_is_a_bijection_with_the_right_inverse():
    for n in [*range(1, 300), *range(300, 5000, 61), 4096, 4097, 5000]:
        order = Permutation(n, n, "phase", 3)
        images = order(np.arange(n))
        assert np.array_equal(np.sort(images), np.arange(n)), n
        assert np.array_equal(order.inverse(images), np.arange(n)), n


@pytest.mark.parametrize("n", [*LARGE, 2**40 + 12345, 2**62 - 1])
def test_large_sizes_stay_in_range_and_invert(n):
    order = Permutation(n, 1, "phase", 0)
    for indices in (np.arange(20_000), np.arange(n - 20_000, n)):
        images = order(indices)
        assert images.min() >= 0 and images.max() < n
        assert len(np.unique(images)) == len(indices)
        assert np.array_equal(order.inverse(images), indices)


def test_a_million_samples_are_a_bijection():
    n = LARGE[0]
    assert np.array_equal(np.bincount(Permutation(n, 5, "p", 1)(np.arange(n))), np.ones(n))


@pytest.mark.parametrize("n", LARGE)
@pytest.mark.parametrize("at_the_end", [False, True])
def test_neighbours_land_as_if_by_chance(n, at_the_end):
    count = 200_000
    images = Permutation(n, 11, "p", 0)(np.arange(n - count, n) if at_the_end else np.arange(count))
    parity_flips = np.mean(np.diff(images % 2) != 0)
    assert 0.495 < parity_flips < 0.505
    per_64 = (images[: count // 64 * 64] % 16).reshape(-1, 64)
    counts = np.stack([(per_64 == value).sum(1) for value in range(16)])
    assert 14.5 < np.mean(((counts - 4) ** 2 / 4).sum(0)) < 15.5  # chi2 with 15 degrees of freedom
    distinct_steps = len(np.unique(np.diff(images))) / (count - 1)
    assert distinct_steps > (0.93 if n == LARGE[0] else 0.99)


@pytest.mark.parametrize("other", [(8, "p", 0), (7, "q", 0), (7, "p", 1)])
def test_seed_name_and_epoch_each_give_another_order(other):
    indices = np.arange(1000)
    assert np.sum(Permutation(1000, 7, "p", 0)(indices) == Permutation(1000, *other)(indices)) < 20


def test_order_of_the_questions_does_not_matter():
    order = Permutation(1000, 7, "p", 0)
    assert order(np.array([5, 999, 5])).tolist() == [order(np.array([i])).item() for i in (5, 999, 5)]
    assert order(np.array([], np.int64)).tolist() == []


@pytest.mark.parametrize("index", [-1, 1000])
def test_an_index_out_of_range_is_refused(index):
    with pytest.raises(AssertionError):
        Permutation(1000, 7, "p", 0)(np.array([index]))
