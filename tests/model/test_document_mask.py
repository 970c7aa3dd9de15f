"""Documents in one row have nothing to do with each other."""

import pytest
import torch
from plain_gpt import GPT2, LLAMA
from test_transformer import lively_model, some_tokens

from llm.config import EngineConfig
from llm.engine.wrap import wrap_model
from llm.model.attention import positions_in_documents

LENGTHS = [[5, 1, 6], [12], [1, 1, 3, 7]]
DOC_IDS = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS])
STYLES = pytest.mark.parametrize("style", [LLAMA, GPT2], ids=["llama", "gpt2"])


def documents(tensor):
    return [document for row, lengths in zip(tensor, LENGTHS, strict=True) for document in row.split(lengths)]


@STYLES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_a_packed_row_has_the_logits_and_gradients_of_each_document_alone(style, attention, checkpointing):
    packed, alone = lively_model(style, attention=attention, init_std=0.1), lively_model(style, attention=attention, init_std=0.1)
    wrap_model(packed, EngineConfig(activation_checkpointing=checkpointing), 1)
    tokens, targets = some_tokens(3, 12), some_tokens(3, 12, seed=3)
    targets[0, :3] = -100
    with torch.no_grad():
        for logits, ids in zip(documents(packed(tokens, doc_ids_BT=DOC_IDS)), documents(tokens), strict=True):
            torch.testing.assert_close(logits, alone(ids[None])[0], atol=1e-5, rtol=1e-5)
    packed(tokens, targets, doc_ids_BT=DOC_IDS).backward()
    sum(alone(ids[None], wanted[None]) for ids, wanted in zip(documents(tokens), documents(targets), strict=True)).backward()
    for (name, a), b in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@STYLES
def test_one_document_a_row_is_the_plain_model(style):
    model, tokens = lively_model(style), some_tokens(2, 12)
    torch.testing.assert_close(model(tokens, doc_ids_BT=torch.zeros(2, 12, dtype=torch.int64)), model(tokens), atol=1e-5, rtol=1e-5)


def test_positions_begin_with_each_document():
    assert positions_in_documents(DOC_IDS).tolist() == [[i for n in row for i in range(n)] for row in LENGTHS]


def test_a_compiled_model_takes_the_mask():
    model, tokens = lively_model(GPT2, init_std=0.1), some_tokens(3, 12)
    wanted = model(tokens, tokens, doc_ids_BT=DOC_IDS)
    model.hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(model(tokens, tokens, doc_ids_BT=DOC_IDS), wanted, atol=1e-4, rtol=1e-5)
