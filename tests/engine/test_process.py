"""What training asks of its process, and that no switch for speed changes what is learned."""

import functools
import gc
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from engine_cases import VOCAB, make_engine, run_config, step_batches

from llm.config import EngineConfig, ModelConfig
from llm.dist import World
from llm.engine import process
from llm.model import products
from llm.model.loss import Head

ALONE = World()
MODEL = {  # everything fused that can be: qkv, gate and up; grouped heads, qk-norm, rope
    "n_layers": 2, "d_model": 24, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40, "seq_len": 8, "vocab_size": VOCAB, "qk_norm": True,
}  # fmt: skip


class WholeLogits(Head):
    """torch's loss of the logits of all rows."""

    def forward(self, x, targets_BT=None, z_loss=0.0):
        return F.cross_entropy(super().forward(x).flatten(0, 1), targets_BT.flatten(), reduction="sum", ignore_index=-100)


SWITCHES = {
    "compile": {"compile": True},
    "activation checkpointing": {"activation_checkpointing": True},
    "attention: eager": {"attention": "eager"},
    "z_loss of zero": {"z_loss": 0.0},
    "window as long as the row": {"sliding_window": 8},
    "documents as long as the row": {"documents": True},
    "logits of all rows at once": {"head": WholeLogits},
    "AdamW of single operations": {"fused": False},
    "fp32 products by oneDNN": {"onednn": not products.ONEDNN},
}


def fifty_steps(change: dict) -> tuple[list[torch.Tensor], list[float]]:
    """Gradients of the first step, and the losses of fifty."""
    torch._dynamo.reset()
    engine = {key: value for key, value in change.items() if key in EngineConfig.model_fields}
    model = MODEL | {key: value for key, value in change.items() if key in ModelConfig.model_fields}
    onednn = mock.patch.multiple(products, ONEDNN=change.get("onednn", products.ONEDNN), FEW_ROWS=1)
    cfg = run_config(ALONE, {"zero_stage": 0} | engine, model=model, clip_norm=None)  # clipping would hide a factor
    with onednn, mock.patch("torch.compile", functools.partial(torch.compile, backend="aot_eager")):  # inductor takes half a minute here
        built, model = make_engine(cfg, ALONE)
        model.head.__class__ = change.get("head", Head)
        built.optimizer.param_groups[:] = [group | {"fused": change.get("fused", True)} for group in built.optimizer.param_groups]
        gradients = []
        with mock.patch.object(built.optimizer, "step", lambda: gradients.extend(p.grad.clone() for p in model.parameters())):
            batches, n_targets = step_batches(0, ALONE)
            if "documents" in change:
                batches = [replace(batch, doc_ids_BT=torch.zeros_like(batch.tokens_BT)) for batch in batches]
            built.train_step(batches, n_targets, 1e-3, lambda loss: True)
        # the same batch, to be learned by heart
        return gradients, [built.train_step(batches, n_targets, 3e-3, lambda loss: True).loss for _ in range(50)]


@pytest.fixture(scope="module")
def plain():
    return fifty_steps({})


@pytest.mark.parametrize("change", SWITCHES.values(), ids=SWITCHES)
def test_a_switch_leaves_the_gradients_and_fifty_losses_as_they_are(plain, change):
    gradients, losses = fifty_steps(change)
    assert len(gradients) == len(plain[0]) and len(losses) == 50
    for ours, expected in zip(gradients, plain[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)
    assert losses == pytest.approx(plain[1], abs=1e-3)
    assert losses[-1] < losses[0] - 1


IN_A_PROCESS_OF_ITS_OWN = """
import torch
from llm.engine.process import settled

def page_faults():
    with open("/proc/self/stat") as file:
        return int(file.read().rpartition(")")[2].split()[7])

def faults_of_five_steps():
    for _ in range(8):
        torch.ones(1 << 23)  # the heap may have to grow a few times
    before = page_faults()
    for _ in range(5):
        torch.ones(1 << 23)  # 32 MiB, written: 8,192 pages
    return page_faults() - before

before = faults_of_five_steps()
with settled("cpu", keep_memory=True):
    print(before, faults_of_five_steps(), (torch.tensor([1e-39]) * 1.0).item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults in /proc")
def test_freed_memory_is_kept_and_denormals_are_zero():
    done = subprocess.run([sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    before, after, tiny = done.stdout.split()
    assert int(after) < 20_000 < 40_000 < int(before)
    assert float(tiny) == 0


def test_garbage_is_collected_between_steps_only_and_as_before_afterwards():
    collected = mock.Mock()
    with process.settled("cuda", keep_memory=True), mock.patch("gc.collect", collected):
        assert not gc.isenabled()
        for step in range(1, 2 * process.COLLECT_EVERY + 1):
            process.collect_garbage(step)
    assert gc.isenabled() and collected.call_count == 2
