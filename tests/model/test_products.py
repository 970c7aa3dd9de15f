"""Products by oneDNN against torch's own, where this machine has them; in fp64 for truth."""

import pytest
import torch
import torch.nn.functional as F

from llm.model import products

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch):
    monkeypatch.setattr(products, "ONEDNN", True)


def through(rows, width, columns, bias, linear):
    torch.manual_seed(rows)
    x, weight = torch.randn(2, rows, width, requires_grad=True), torch.randn(columns, width, requires_grad=True)
    bias = torch.randn(columns, requires_grad=True) if bias else None
    y = linear(x, weight, bias)
    return y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [t for t in (x, weight, bias) if t is not None])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "columns"), [(24, 100), (100, 24), (7, 3)])
def test_a_linear_map_and_its_gradients_are_torchs(width, columns, bias):
    assert products._wants_onednn(torch.ones(1), 64)
    for ours, theirs in zip(*(through(64, width, columns, bias, f) for f in (products.linear, F.linear)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        assert ours.is_contiguous()


def test_other_dtypes_few_rows_and_autocast_go_as_before():
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(torch.ones(64, 8), torch.ones(8, 8), None).dtype == torch.bfloat16
    assert not products._wants_onednn(torch.ones(1).bfloat16(), 64)
    assert not products._wants_onednn(torch.ones(1), 63)
