import pytest
import torch
import torch.nn.functional as F

from llm.model import loss as loss_module
from llm.model.loss import cross_entropy_sum


def logits_and_targets(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(37, 50, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (37,), generator=generator)
    targets[::5] = -100
    return logits, targets


@pytest.mark.parametrize("slice_elements", [1, 50, 500, 1 << 20])
def test_sum_and_gradient_equal_torchs_whatever_the_slice(monkeypatch, slice_elements):
    monkeypatch.setattr(loss_module, "CPU_SLICE", slice_elements)
    logits, targets = logits_and_targets()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected * 0.25, logits)
    ours = cross_entropy_sum(logits * 1.0, targets)
    torch.testing.assert_close(ours, expected)
    (ours * 0.25).backward()
    torch.testing.assert_close(logits.grad, expected_grad)


def test_bf16_logits_are_summed_in_fp32():
    logits, targets = logits_and_targets(torch.bfloat16)
    expected = F.cross_entropy(logits.float(), targets, reduction="sum")
    ours = cross_entropy_sum(logits, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)


def test_rows_that_are_not_counted_give_neither_loss_nor_gradient():
    logits, targets = logits_and_targets()
    ours = cross_entropy_sum(logits * 1.0, torch.full_like(targets, -100))
    ours.backward()
    assert ours == 0
    assert not logits.grad.any()


def test_a_second_backward_is_refused_because_the_logits_are_gone():
    logits, targets = logits_and_targets()
    ours = cross_entropy_sum(logits * 1.0, targets)
    ours.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        ours.backward()


def test_the_compiled_form_gives_the_same_sum_and_gradient():
    logits, targets = logits_and_targets(torch.bfloat16)
    results = []
    for form in (cross_entropy_sum, torch.compile(cross_entropy_sum, backend="aot_eager", fullgraph=True, dynamic=False)):
        loss = form(logits * 1.0, targets)
        results.append((loss, *torch.autograd.grad(loss * 0.25, logits)))
    torch.testing.assert_close(*results)
