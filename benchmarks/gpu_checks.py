"""Is Tally right on this GPU? A command for each check; every finding is a line of results.jsonl.

benchmarks/gpu_hour.sh A runs them all.

  python benchmarks/gpu_checks.py attention
  python benchmarks/gpu_checks.py resume --tiny --out build/gpu_hour
"""

import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import gpu_findings
import torch
import torch.nn.functional as F
from gpu_findings import ROOT, Bench, make_dataset, temporary_folder, train
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm.checkpoint import staging
from llm.checkpoint.slices import KINDS, Slice, state_hash
from llm.config import ModelConfig, RunConfig, check_config, load_config
from llm.data.stream import Batch
from llm.dist import World
from llm.engine import build_engine
from llm.engine.attention_kernel import training_kernels, varlen_off, varlen_trouble
from llm.generate.generator import generate_rows
from llm.generate.sampling import Sampling
from llm.model.attention import causal_mask, document_mask, sdpa_attention
from llm.model.init import build_model
from llm.model.loss import Head, take_loss

WRONG = 5e-2  # relative: bf16 keeps 8 bits


def main() -> None:
    checks = (environment, attention, shapes, generate, steps, loss, page_locked, resume)
    gpu_findings.main(__doc__, {check.__name__: check for check in checks})


def environment(bench: Bench, _) -> None:
    """What is here."""
    found = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "alloc": os.environ.get("PYTORCH_ALLOC_CONF"),
        "cpus": os.cpu_count(),
    }
    if not bench.tiny:
        torch.empty(
            1 << 28, device=bench.device
        )  # the first tensor, which growing segments may not survive
        gpu = torch.cuda.get_device_properties(0)
        q = torch.randn(1, 4, 256, 64, device=bench.device, dtype=bench.dtype)
        found |= {
            "gpu": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "capability": torch.cuda.get_device_capability(),
            "nccl": torch.cuda.nccl.version(),
            "segments_grow": any(s.get("is_expandable") for s in torch.cuda.memory_snapshot()),
            "kernels": torch._C._get_sdp_priority_order(),
            "kernel": torch._fused_sdp_choice(q, q, q, None, 0.0, True),
        }
    bench.tell("environment", **found)


# ------------------------------------------------------------------ attention, by each kernel


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    n_heads: int
    n_kv_heads: int
    seq_len: int
    d_head: int
    mask: str | None = None
    shift: float = 0.0
    """Added to all logits: what softmax must not see, and some kernels do."""

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            n_layers=1,
            d_model=self.n_heads * self.d_head,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            d_head=self.d_head,
            d_ff=8,
            seq_len=self.seq_len,
            vocab_size=8,
        )


CASES = [
    Case("gpt-1b", 2, 16, 8, 2048, 128),
    Case("toy", 8, 6, 2, 256, 32),
    Case("gpt2", 4, 12, 12, 1024, 64),
    *(
        Case(f"{T} tokens", 2, 8, 2, T, 64, mask)
        for T in (61, 130, 192, 261, 704, 1000, 1088)
        for mask in (None, "documents")
    ),
    Case("window", 2, 8, 2, 1024, 64, "window"),
    Case("704 tokens, low logits", 1, 2, 2, 704, 64, "documents", -120.0),  # pytorch/pytorch#196678
    Case("192 tokens, low logits", 1, 2, 2, 192, 64, "window", -120.0),
]
TINY_CASES = [CASES[1], CASES[4], CASES[-1]]


def kernels(bench: Bench) -> dict[str, Callable[[], AbstractContextManager]]:
    """Name -> a context in which that one computes attention, or torch chooses."""
    names = {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    found = {"flash": SDPBackend.FLASH_ATTENTION} | ({} if bench.tiny else names)
    return {name: lambda kernel=kernel: sdpa_kernel(kernel) for name, kernel in found.items()} | {
        "torch's choice": nullcontext
    }


def attention(bench: Bench, _) -> None:
    """Outputs and gradients, for shapes at which some kernel is known to fail."""
    torch.manual_seed(0)
    for case in TINY_CASES if bench.tiny else CASES:
        qkv, grad, mask = inputs_of(case, bench)
        with sdpa_kernel(SDPBackend.MATH):
            wanted = attention_results([x.float() for x in qkv], grad.float(), mask)
        ways = kernels(bench) | {
            "as in training": lambda case=case: training_kernels(case.model, case.mask is not None)
        }
        for way, context in ways.items():
            if way == "flash" and mask is not None and not bench.tiny:
                continue  # it takes none
            with bench.guarded("attention", case=case.name, mask=case.mask, way=way), context():
                got, again = (attention_results(qkv, grad, mask) for _ in range(2))
                off = [largest_difference(a, b, case) for a, b in zip(got, wanted, strict=True)]
                not_finite = sum(int((~x.isfinite()).sum()) for x in got)
                bench.tell(
                    "attention",
                    case=case.name,
                    mask=case.mask,
                    way=way,
                    off=[f"{x:.1e}" for x in off],
                    not_finite=not_finite,
                    repeats_bitwise=all(map(torch.equal, got, again)),
                    kernel=chosen_kernel(qkv, mask),
                    verdict="ok" if not not_finite and max(off) < WRONG else "WRONG",
                )


def inputs_of(case: Case, bench: Bench) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """q, k and v as layers give them, the gradient of the output, and the mask."""

    def heads(n: int, scale: float) -> Tensor:
        shape = (case.rows, case.seq_len, n, case.d_head)
        return scale * torch.randn(shape, device=bench.device, dtype=torch.bfloat16).transpose(1, 2)

    qkv, grad = (
        [heads(case.n_heads, 0.3), heads(case.n_kv_heads, 0.3), heads(case.n_kv_heads, 1.0)],
        heads(case.n_heads, 1.0),
    )
    if case.shift:
        qkv[0][..., 0], qkv[1][..., 0] = 1.0, case.shift * math.sqrt(case.d_head)
    mask, positions = None, torch.arange(case.seq_len, device=bench.device)
    if case.mask == "documents":
        mask = document_mask((positions // 50).expand(case.rows, -1))
    elif case.mask == "window":
        mask = causal_mask(case.seq_len, case.seq_len, positions.device, 100)[None, None]
    return qkv, grad, mask


def attention_results(qkv: list[Tensor], grad: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The output and the gradients of q, k and v, in fp32."""
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    y = sdpa_attention(*leaves, None, mask)
    return [x.detach().float() for x in (y, *torch.autograd.grad(y, leaves, grad.to(y.dtype)))]


def largest_difference(got: Tensor, wanted: Tensor, case: Case) -> float:
    """Relative. The component that shifts the logits is left out: its gradients are rounding."""
    got, wanted = (x[..., 1 if case.shift else 0 :] for x in (got, wanted))
    return ((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)).item()


def chosen_kernel(qkv: list[Tensor], mask: Tensor | None) -> dict[str, str]:
    """By dtype. `math` holds T x T numbers a head in fp32."""
    found, is_grouped = {}, qkv[0].shape[1] != qkv[1].shape[1]
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.to(dtype) for x in qkv)
        choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, mask is None, enable_gqa=is_grouped)
        found[str(dtype)] = SDPBackend(choice).name.lower()
    return found


@torch.inference_mode()
def shapes(bench: Bench, _) -> None:
    """How long attention takes for a new length, as in generation; and the trial of varlen_attn."""
    n = 4 if bench.tiny else 16
    for way, context in kernels(bench).items():
        with bench.guarded("shapes", way=way), context():
            q = torch.randn(1, 16, 1, 128, device=bench.device, dtype=bench.dtype)
            cache = torch.randn(1, 8, 512, 128, device=bench.device, dtype=bench.dtype)
            first, again = [], []
            for length in range(65, 65 + n):
                keys = cache[:, :, :length]
                for store in (first, again):
                    store.append(
                        1e3
                        * bench.once(
                            lambda q=q, keys=keys: F.scaled_dot_product_attention(
                                q, keys, keys, enable_gqa=True
                            )
                        )
                    )
            bench.tell(
                "shapes",
                way=way,
                ms_first=[round(ms, 2) for ms in first],
                ms_again=round(statistics.median(again), 3),
            )
    for is_compiled in (False, True):
        with bench.guarded("varlen", compiled=is_compiled), torch.inference_mode(False):
            cfg = load_config(ROOT / "configs/gpt-1b.yaml").model
            trouble = varlen_trouble(cfg, "bf16", bench.device, is_compiled)
            off = None if bench.tiny else varlen_off(cfg, bench.device, is_compiled)
            bench.tell("varlen", compiled=is_compiled, trouble=trouble, off=off)


def generate(bench: Bench, _) -> None:
    """Tokens a second, and whether cuDNN would write the same text."""
    cfg, model = bench.model()
    model, n = model.to(bench.dtype).eval(), 8 if bench.tiny else 48
    endless = SimpleNamespace(vocab_size=cfg.model.vocab_size, eos_id=-1)
    texts = {}
    for way, context in {"as it is": nullcontext, "with cuDNN": with_cudnn}.items():
        for rows in (1, 8):
            with bench.guarded("generate", way=way, rows=rows), context():

                def written(n: int, rows: int = rows) -> list[tuple[int, int]]:
                    prompts = [list(range(1, 60))] * rows
                    return list(
                        generate_rows(
                            model,
                            endless,
                            prompts,
                            max_tokens=n,
                            sampling=Sampling(temperature=0),
                            seed=0,
                        )
                    )

                written(2)
                seconds = bench.once(
                    lambda way=way, written=written: texts.update({way: written(n)})
                )
                bench.tell(
                    "generate",
                    way=way,
                    rows=rows,
                    tokens_per_s=round(rows * n / seconds, 1),
                    ms_a_token=round(1e3 * seconds / n, 2),
                )
    bench.tell("generate", same_text=texts.get("as it is") == texts.get("with cuDNN"))


def with_cudnn() -> AbstractContextManager:
    return mock.patch("llm.generate.generator.without_cudnn", nullcontext)


# ------------------------------------------------------------------ training steps


def little(bench: Bench, **engine) -> RunConfig:
    model = {
        "n_layers": 4,
        "d_model": 256,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_head": 64,
        "d_ff": 704,
    }
    if bench.tiny:
        model = {
            "n_layers": 1,
            "d_model": 64,
            "n_heads": 2,
            "n_kv_heads": 1,
            "d_head": 32,
            "d_ff": 64,
        }
    model |= {"seq_len": 256, "vocab_size": 2048, "qk_norm": True}
    sections = {"tokenizer": {"tokenizer_path": "none"}, "data": {"data_path": "none"}}
    taken = {"lr": 2e-3, "batch_size": 4, "grad_accum": 2, "clip_norm": 1.0}
    return check_config(
        {"model": model, "train": taken, "engine": {"zero_stage": 0} | engine} | sections,
        "the check's config",
    )


def little_batches(step: int) -> list[Batch]:
    """Two micro-batches in which most ids are 7 more than the one before."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, 2048, (8, 1), generator=generator)
    noise = torch.rand(8, 257, generator=generator) < 0.1
    rows = (starts + 7 * torch.arange(257) + 13 * noise) % 2048
    return [
        Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), None, None)
        for part in rows.split(4)
    ]


def steps(bench: Bench, _) -> None:
    """The losses of the same steps on the CPU and on the GPU, in every form."""
    n, losses = 2 if bench.tiny else 30, {}
    forms = {
        "cpu": ("cpu", {"precision": "fp32"}),
        "fp32": (bench.device, {"precision": "fp32"}),
        "bf16": (bench.device, {"precision": "bf16"}),
        "bf16 again": (bench.device, {"precision": "bf16"}),
        "bf16 compiled": (bench.device, {"precision": "bf16", "compile": True}),
        "bf16 recomputed": (bench.device, {"precision": "bf16", "activation_checkpointing": 1.0}),
    }
    for form, (device, how) in forms.items():
        with bench.guarded("steps", form=form):
            cfg = little(bench, **how)
            engine = build_engine(cfg, World(device=device), build_model(cfg.model, 1))
            with training_kernels(cfg.model, False):
                updates = [
                    engine.train_step(little_batches(step), 8 * 256, 2e-3, math.isfinite)
                    for step in range(n)
                ]
            losses[form] = [update.loss for update in updates]
            off = [abs(a / b - 1) for a, b in zip(losses[form], losses["cpu"], strict=True)]
            bench.tell(
                "steps",
                form=form,
                first=losses[form][0],
                last=losses[form][-1],
                off_first=f"{off[0]:.1e}",
                off_most=f"{max(off):.1e}",
                same_as_bf16=losses[form] == losses.get("bf16"),
                applied=all(update.applied for update in updates),
                verdict="ok" if max(off) < WRONG else "WRONG",
            )


def loss(bench: Bench, _) -> None:
    """Head and cross-entropy, by chunks and compiled, against torch's own in fp32."""
    vocabulary, width, rows = (512, 64, 200) if bench.tiny else (32768, 2048, 16384)
    sizes = [f"model.vocab_size={vocabulary}", f"model.d_model={width}"]
    for softcap, z_loss in ((None, 0.0), (30.0, 1e-4)):
        cfg = load_config(ROOT / "configs/gpt-1b.yaml", sizes).model.model_copy(
            update={"logit_softcap": softcap}
        )
        torch.manual_seed(0)
        head = Head(cfg).to(bench.device)
        torch.nn.init.normal_(head.weight, std=0.02)
        x = torch.randn(rows, width, device=bench.device)
        targets = torch.randint(0, vocabulary, (rows,), device=bench.device)
        targets[::7] = -100
        wanted = loss_by_definition(x, head.weight, targets, softcap, z_loss)
        for way in ("eager", "compiled"):
            with bench.guarded("loss", way=way, softcap=softcap):
                bench.forget_peak()
                head.take_loss = (
                    torch.compile(take_loss, fullgraph=True, dynamic=False)
                    if way == "compiled"
                    else Head(cfg).take_loss
                )
                got = loss_of(head, x, targets, z_loss, bench)
                off = [
                    abs(got[0] / wanted[0] - 1),
                    *(
                        ((a - b).norm() / b.norm()).item()
                        for a, b in zip(got[1:], wanted[1:], strict=True)
                    ),
                ]
                seconds = bench.seconds(
                    lambda head=head, x=x, targets=targets, z=z_loss: loss_of(
                        head, x, targets, z, bench
                    )
                )
                bench.tell(
                    "loss",
                    way=way,
                    softcap=softcap,
                    off=[f"{o:.1e}" for o in off],
                    ms=round(1e3 * seconds, 2),
                    tflops=round(6 * rows * vocabulary * width / seconds / 1e12, 1),
                    peak_gib=bench.peak_gib(),
                    verdict="ok" if max(off) < WRONG else "WRONG",
                )


def loss_of(
    head: Head, x: Tensor, targets: Tensor, z_loss: float, bench: Bench
) -> tuple[float, Tensor, Tensor]:
    """The sum, and the gradients of hidden states and weights."""
    x, head.weight.grad = x.clone().requires_grad_(), None
    with torch.autocast(torch.device(bench.device).type, torch.bfloat16):
        total = head(x, targets, z_loss)
    total.backward()
    return total.item(), x.grad, head.weight.grad


def loss_by_definition(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, z_loss: float
) -> tuple[float, Tensor, Tensor]:
    x, weight, total = x.clone().requires_grad_(), weight.detach().clone().requires_grad_(), 0.0
    for part, its_targets in zip(x.split(4096), targets.split(4096), strict=True):
        logits = part @ weight.T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        one = F.cross_entropy(logits, its_targets, reduction="sum")
        one = one + z_loss * (logits.logsumexp(-1).square() * (its_targets != -100)).sum()
        one.backward()
        total += one.item()
    return total, x.grad, weight.grad


# ------------------------------------------------------------------ what a save copies


def page_locked(bench: Bench, _) -> None:
    """The copy of an asynchronous save: its speed, and whether it is one in memory used again."""
    numel, parts = (1 << 16, 4) if bench.tiny else (1_172_405_760 // 180, 180)
    slices = [
        Slice(f"p{i}", kind, 0, torch.randn(numel, device=bench.device))
        for i in range(parts)
        for kind in KINDS
    ]
    keep, addresses = staging.Staging(), []
    for turn in ("first", "again", "after it was given up"):
        with bench.guarded("page_locked", turn=turn):
            if turn.startswith("after"):
                keep.give_up()
            copies = []
            seconds = bench.once(lambda copies=copies: copies.extend(keep.copy(slices)))
            keep.check(state_hash(copies))
            addresses.append(keep._buffer.data_ptr())
            bench.tell(
                "page_locked",
                turn=turn,
                gb_per_s=round(12 * numel * parts / 1e9 / seconds, 1),
                seconds=round(seconds, 3),
                locked=keep._is_locked,
                same_address=len(set(addresses)) == 1,
                next_kernel=float((slices[0].values * 0).sum()),
            )
    keep.close()
    if not bench.tiny:
        with bench.guarded("page_locked", turn="an error"):
            locked = staging._lock(
                torch.empty(0), torch.device(bench.device)
            )  # of nothing: invalid value
            bench.tell(
                "page_locked",
                turn="an error",
                locked=locked,
                next_kernel=float((slices[0].values * 0).sum()),
            )


# ------------------------------------------------------------------ killed and resumed

DETERMINISTIC = (
    "os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'; torch.use_deterministic_algorithms(True)"
)


def resume(bench: Bench, _) -> None:
    """Is killed and resumed, or the same once more, bit for bit what never stopped has given?"""
    forms = [
        ("as it comes", False),
        ("deterministic", False),
        ("as it comes", True),
    ]  # the most telling first
    with temporary_folder() as root:
        sections = make_dataset(root, 256, 30_000 if bench.tiny else 200_000)
        for way, is_compiled in forms[:1] if bench.tiny else forms:
            with bench.guarded("resume", way=way, compiled=is_compiled):
                resume_one(bench, root, sections, way, is_compiled)


def resume_one(bench: Bench, root: Path, sections: dict, way: str, is_compiled: bool) -> None:
    save_every, first = 4 if bench.tiny else 20, DETERMINISTIC if way == "deterministic" else "pass"
    found, resumed_from = {}, None
    for run in ("whole", "killed") if is_compiled else ("whole", "again", "killed"):
        name = f"{way.replace(' ', '-')}-{'compiled' if is_compiled else 'eager'}-{run}"
        cfg = resume_config(bench, sections, name, save_every, is_compiled)
        if run == "killed":
            train(cfg, root, first=first, kill_at="saved ")
            resumed_from = newest(root, name).get("step")
        code, said = train(cfg, root, first=first)
        found[run] = newest(root, name)
        if code or found[run].get("step") != 3 * save_every:
            return bench.tell(
                "resume", way=way, compiled=is_compiled, run=run, code=code, failed=said[-1500:]
            )
    same = {
        key: {run: its[key] == found["whole"][key] for run, its in found.items()}
        for key in ("state_hash", "chain")
    }
    bench.tell(
        "resume",
        way=way,
        compiled=is_compiled,
        resumed_from=resumed_from,
        same_weights=same["state_hash"],
        same_data=same["chain"],
        verdict="ok"
        if all(same["chain"].values()) and resumed_from in (save_every, 2 * save_every)
        else "WRONG",
    )
    return None


def resume_config(
    bench: Bench, sections: dict, name: str, save_every: int, is_compiled: bool
) -> dict:
    model = json.loads(little(bench).model_dump_json(include={"model"}))["model"]
    taken = {
        "lr": 2e-3,
        "batch_size": 4,
        "batch_tokens": 8 * 256,
        "total_step_budget": 3 * save_every,
        "warmup_steps": 5,
        "eval_every": save_every,
        "eval_rows": 8,
    }
    engine = {
        "zero_stage": 0,
        "precision": "fp32" if bench.tiny else "bf16",
        "compile": is_compiled,
        "device": torch.device(bench.device).type,
    }
    log = {"log_every": 1, "tensorboard": False, "sample_prompts": ["w1 w2"], "sample_tokens": 8}
    checkpoint = sections["checkpoint"] | {"run_name": name, "save_every": save_every}
    return sections | {
        "model": model,
        "train": taken,
        "engine": engine,
        "log": log,
        "checkpoint": checkpoint,
    }


def newest(root: Path, run: str) -> dict:
    """The manifest of the run's newest checkpoint."""
    found = sorted((root / "checkpoints" / run).glob("step-*/MANIFEST.json"))
    return json.loads(found[-1].read_text()) if found else {}


if __name__ == "__main__":
    main()
