"""The head's loss against torch's own cross-entropy of whole logits."""

import pytest
import torch
import torch.nn.functional as F

from llm.config import ModelConfig
from llm.engine.census import LiveBytes
from llm.model import loss as loss_module
from llm.model.loss import Head, take_loss, take_loss_in_slices

CONFIG = ModelConfig(n_layers=1, d_model=24, n_heads=2, d_ff=8, seq_len=37, vocab_size=50, head_bias=True)


def head_and_rows(**model):
    torch.manual_seed(1)
    head = Head(CONFIG.model_copy(update=model))
    for p in head.parameters():
        torch.nn.init.normal_(p)
    targets = torch.randint(0, 50, (2, 37))
    targets[:, ::5] = -100
    return head, torch.randn(2, 37, 24, requires_grad=True), targets


def plain_loss(head, x, targets, z_loss=0.0):
    logits, targets = head(x).float().flatten(0, 1), targets.flatten()
    z = logits.logsumexp(dim=-1).square()[targets != -100].sum()
    return F.cross_entropy(logits, targets, reduction="sum") + z_loss * z


def gradients(loss, head, x):
    return torch.autograd.grad(loss * 0.25, [x, *head.parameters()])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize(("chunk", "part"), [(1, 1), (500, 150), (1 << 25, 1 << 19)])
def test_loss_and_gradients_are_torchs_whatever_the_chunk(monkeypatch, chunk, part, z_loss, softcap):
    monkeypatch.setattr(loss_module, "CPU_CHUNK", chunk)
    monkeypatch.setattr(loss_module, "CPU_SLICE", part)
    head, x, targets = head_and_rows(logit_softcap=softcap)
    ours, plain = head(x, targets, z_loss), plain_loss(head, x, targets, z_loss)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(gradients(ours, head, x), gradients(plain, head, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_in_bf16_sums_are_in_fp32_and_gradients_as_good_as_the_logits():
    head, x, targets = head_and_rows()
    exact = plain_loss(head, x, targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = head(x, targets), plain_loss(head, x, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain)
    wanted = gradients(exact, head, x)
    for a, b, true in zip(gradients(ours, head, x), gradients(plain, head, x), wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - true).norm() < 1.1 * (b - true).norm() < 0.02 * true.norm()


def test_rows_that_are_not_counted_give_neither_loss_nor_gradient():
    head, x, targets = head_and_rows()
    ours = head(x, torch.full_like(targets, -100))
    assert ours == 0
    assert not any(g.any() for g in gradients(ours, head, x))


def test_a_very_unlikely_target_costs_what_it_should():
    logits = torch.zeros(1, 50)
    logits[0, 7] = 1000.0
    loss, grads, scales = take_loss(logits, torch.tensor([3]), 0.0, None, True)
    assert (loss, scales) == (1000, 1)
    assert (grads[0, 7], grads[0, 3], grads.abs().sum()) == (1, -1, 2)


def test_a_second_backward_is_refused_because_the_gradients_are_gone():
    head, x, targets = head_and_rows()
    ours = head(x, targets)
    ours.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        ours.backward()


def test_without_gradients_the_loss_is_the_same_and_nothing_is_kept():
    head, x, targets = head_and_rows()
    with torch.no_grad():
        assert head(x, targets) == head(x.detach(), targets).item()
        assert head(x, targets).grad_fn is None


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("dtype", "of_loss", "of_gradient"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-4, 2**-7)])
def test_the_compiled_form_gives_the_same_sum_and_gradient(dtype, of_loss, of_gradient, softcap):
    logits = 3 * torch.randn(37, 50, generator=torch.Generator().manual_seed(1))
    targets = torch.randint(0, 50, (37,))
    targets[::5] = -100
    results = []
    for form in (take_loss_in_slices, torch.compile(take_loss, backend="aot_eager", fullgraph=True, dynamic=False)):
        loss, grads, scales = form(logits.clone().to(dtype), targets, 0.1, softcap, True)
        results.append((loss, grads.float() * scales))
    for ours, theirs, rtol in zip(*results, (of_loss, of_gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-5)


def test_there_are_never_two_chunks_of_logits_at_once(monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_CHUNK", 1 << 20)
    monkeypatch.setattr(loss_module, "CPU_SLICE", 1 << 14)
    head = Head(CONFIG.model_copy(update={"d_model": 8, "vocab_size": 4096, "head_bias": False}))
    for p in head.parameters():
        torch.nn.init.zeros_(p)
    x, targets = torch.zeros(1024, 8, requires_grad=True), torch.zeros(1024, dtype=torch.int64)
    with LiveBytes() as live:
        head(x, targets).backward()
    assert 4 << 20 < live.peak < 7 << 20  # a chunk is 4 MiB
