"""Documents apart without a mask. torch's kernel needs a GPU: a stand-in computes what it promises, and its own checks see our calls."""

import functools
import inspect
from unittest import mock

import pytest
import torch
from plain_gpt import LLAMA
from test_document_mask import DOC_IDS, LENGTHS, STYLES
from test_transformer import lively_model, some_tokens
from torch._dynamo.testing import CompileCounterWithBackend
from varlen_stand_in import OF_TORCH, stand_in

from llm.config import EngineConfig
from llm.engine.wrap import wrap_model
from llm.model import varlen
from llm.model.varlen import document_starts, let_vary, varlen_attention

STARTS = document_starts(DOC_IDS)
CHECKPOINTING = pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])


def test_documents_start_where_the_number_or_the_row_changes():
    ends = torch.tensor([length for row in LENGTHS for length in row]).cumsum(0)
    assert STARTS.tolist() == [0, *ends.tolist()] and STARTS.dtype == torch.int32
    assert document_starts(torch.tensor([[7, 7, 7], [7, 7, 7], [7, 2, 7]])).tolist() == [0, 3, 6, 7, 8, 9]


def loss_and_gradients(model, *documents) -> list[torch.Tensor]:
    tokens, targets = some_tokens(3, 12), some_tokens(3, 12, seed=3)
    targets[0, :3] = -100
    loss = model(tokens, targets, None, *documents)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@STYLES
@CHECKPOINTING
@pytest.mark.parametrize(("of_torch", "window"), [("2.10", None), ("2.10", 12), ("2.11", 4), ("2.12", None), ("2.12", 4), ("2.12", 1)])
def test_losses_and_gradients_are_those_of_the_mask(style, checkpointing, of_torch, window):
    model = lively_model(style, init_std=0.1, sliding_window=window)
    wanted = loss_and_gradients(model, DOC_IDS)
    wrap_model(model, EngineConfig(activation_checkpointing=checkpointing), 1)
    with stand_in(of_torch), mock.patch("llm.model.transformer.document_mask", side_effect=AssertionError("a mask was made")):
        found = loss_and_gradients(model, DOC_IDS, STARTS)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
def test_it_is_given_bf16_under_autocast_and_also_where_something_made_fp32_of_it(autocast):
    model = lively_model(LLAMA, init_std=0.1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = loss_and_gradients(model, DOC_IDS)
        with stand_in(dtype=torch.bfloat16):
            found = loss_and_gradients(model, DOC_IDS, STARTS)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.02 * theirs.abs().max().item(), rtol=0.05)


@CHECKPOINTING
@pytest.mark.parametrize("ranks", [1, 2], ids=["whole", "blocks"])
def test_a_compiled_model_is_compiled_once_for_any_number_of_documents(ranks, checkpointing):
    model, graphs = lively_model(LLAMA, init_std=0.1), CompileCounterWithBackend("aot_eager")
    batches = [torch.arange(12).clamp(max=n).expand(3, 12) for n in range(11)]  # of n + 1 documents a row; torch gives up at nine shapes
    wanted = [loss_and_gradients(model, doc_ids) for doc_ids in batches]
    torch._dynamo.reset()
    with mock.patch("torch.compile", functools.partial(torch.compile, backend=graphs)):
        wrap_model(model, EngineConfig(compile=True, activation_checkpointing=checkpointing), ranks)
    counts = []
    with stand_in():
        for doc_ids, theirs in zip(batches, wanted, strict=True):
            for ours, expected in zip(loss_and_gradients(model, doc_ids, document_starts(doc_ids)), theirs, strict=True):
                torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
            counts.append(graphs.frame_count)
    assert counts == [2] * len(batches)  # blocks, and the loss


# ---------------------------------------------------------------- torch's own function, which traces without a GPU


def test_what_this_torch_has_is_what_we_believe_it_has():
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    has = {name: name in names for name in ("window_size", "is_causal", "enable_gqa")}
    assert has == {"window_size": varlen.HAS_WINDOW, "is_causal": not varlen.HAS_WINDOW, "enable_gqa": varlen.HAS_GROUPS}
    assert (varlen.HAS_WINDOW, varlen.HAS_GROUPS) in {tuple(has) for _, *has in OF_TORCH.values()}


@pytest.mark.parametrize("window", [None, pytest.param(4, marks=pytest.mark.skipif(not varlen.HAS_WINDOW, reason="this torch has no window"))])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_torchs_own_takes_our_call_and_gives_gradients_of_the_right_shapes(G, window):
    q, k, v = (torch.empty(3, heads, 12, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, G, G))
    y = varlen_attention(q, k, v, window, STARTS.to("meta"))
    assert (y.shape, y.dtype) == (q.shape, torch.bfloat16)
    assert [g.shape for g in torch.autograd.grad(y.sum(), (q, k, v))] == [x.shape for x in (q, k, v)]


@CHECKPOINTING
@pytest.mark.parametrize("ranks", [1, 2], ids=["whole", "blocks"])
def test_torchs_own_is_part_of_one_graph_of_the_model(ranks, checkpointing):
    model, graphs = lively_model(LLAMA).to("meta"), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    with mock.patch("torch.compile", functools.partial(torch.compile, backend=graphs)):
        wrap_model(model, EngineConfig(compile=True, activation_checkpointing=checkpointing), ranks)
    tokens = some_tokens(3, 12).to("meta")
    for doc_ids in (DOC_IDS, DOC_IDS * 0):
        starts = document_starts(doc_ids).to("meta")
        let_vary(starts)
        hidden = model.hidden(tokens, None, doc_ids.to("meta"), starts)
        hidden.sum().backward()
        assert hidden.shape == (3, 12, 24) and model.blocks[0].attn.qkv.weight.grad is not None
    assert graphs.frame_count == 1
