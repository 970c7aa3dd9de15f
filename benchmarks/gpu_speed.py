"""How fast is Tally on this GPU? A command for each check; each finding is a line of results.jsonl.

benchmarks/gpu_hour.sh B runs them all.

  python benchmarks/gpu_speed.py step --rows 16 --compiled --profile
  python benchmarks/gpu_speed.py save --tiny --out build/gpu_hour
"""

import json
import math
import shutil
import statistics
import subprocess
from contextlib import AbstractContextManager, nullcontext

import gpu_findings
import torch
import torch.nn.functional as F
from gpu_findings import Bench, make_dataset, random_batch, temporary_folder, train
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm import cli
from llm.config import RunConfig, check_config
from llm.dist import World
from llm.engine import Engine, build_engine
from llm.engine.attention_kernel import attention_kernel, training_kernels
from llm.engine.torch_engine import TorchEngine
from llm.engine.wrap import wrap_model
from llm.model.flops import flops_per_token, palm_flops_per_token, peak_flops
from llm.plan.memory import memory_of

AS_IT_IS, BLOCK_BY_BLOCK, BF16_RESIDUAL = WAYS = ("as it is", "block by block", "bf16 residual")


def main() -> None:
    checks = (rates, step, memory, save)
    gpu_findings.main(__doc__, {check.__name__: check for check in checks}, add_options)


def add_options(parser: cli.Parser) -> None:
    parser.add_argument("--rows", type=int, default=16, help="of a micro-batch (%(default)s)")
    parser.add_argument(
        "--accumulation", type=int, default=4, help="micro-batches a step (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=4, help="that are timed (%(default)s)")
    parser.add_argument("--compiled", action="store_true", help="engine.compile")
    parser.add_argument("--profile", action="store_true", help="one step more, by kernels")
    parser.add_argument(
        "--way",
        choices=WAYS,
        default=AS_IT_IS,
        help="what is compiled together, or the residual stream's dtype (%(default)s)",
    )
    parser.add_argument(
        "--kernel",
        choices=("as it is", "flash"),
        default="as it is",
        help="of attention (%(default)s)",
    )


# ------------------------------------------------------------------ what the device gives


def rates(bench: Bench, _) -> None:
    """Products of the 1.17B model's shapes, a copy, and attention by each kernel."""
    n = 512 if bench.tiny else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    bench.tell(
        "rates",
        what="product",
        n=n,
        tflops=round(2 * n**3 / bench.seconds(lambda: a @ b.T, 10) / 1e12, 1),
    )
    rows = 256 if bench.tiny else 32768
    shapes = {
        "qkv": (2048, 4096),
        "out": (2048, 2048),
        "gate_up": (2048, 11264),
        "down": (5632, 2048),
    }
    for name, (inputs, outputs) in {"qkv": (64, 128)}.items() if bench.tiny else shapes.items():
        sizes = ((rows, inputs), (outputs, inputs), (rows, outputs))
        x, w, grad = (
            torch.randn(size, device=bench.device, dtype=torch.bfloat16) for size in sizes
        )
        products = {
            "y": lambda x=x, w=w: F.linear(x, w),
            "dx": lambda w=w, grad=grad: grad @ w,
            "dw": lambda x=x, grad=grad: grad.T @ x,
        }
        tflops = {
            way: round(2 * rows * inputs * outputs / bench.seconds(work) / 1e12, 1)
            for way, work in products.items()
        }
        bench.tell("rates", what=name, rows=rows, tflops=tflops)
    bench.tell("rates", what="copy", tb_per_s=round(copy_rate(bench) / 1e12, 2))
    for kernel in (
        SDPBackend.FLASH_ATTENTION,
        *(() if bench.tiny else (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)),
    ):
        with bench.guarded("rates", what=kernel.name), sdpa_kernel(kernel):
            attention_rate(bench, kernel.name)


def copy_rate(bench: Bench) -> float:
    """Bytes read and written a second."""
    source = torch.empty(1 << (20 if bench.tiny else 31), device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / bench.seconds(lambda: target.copy_(source))


def attention_rate(bench: Bench, name: str) -> None:
    """Of causal rows with heads like the 1.17B model's; half of the products fall away."""
    rows, T, K = (1, 128, 32) if bench.tiny else (16, 2048, 128)
    sizes = [(rows, T, heads, K) for heads in (16, 8, 8, 16)]
    q, k, v, grad = (
        torch.randn(size, device=bench.device, dtype=torch.bfloat16).transpose(1, 2)
        for size in sizes
    )
    leaves, flops = [x.requires_grad_() for x in (q, k, v)], 2 * rows * 16 * T * (T + 1) * K

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)

    forward_s = bench.seconds(forward)
    backward_s = bench.seconds(lambda: torch.autograd.grad(forward(), leaves, grad)) - forward_s
    ms = {"forward": round(1e3 * forward_s, 2), "backward": round(1e3 * backward_s, 2)}
    bench.tell(
        "rates",
        what=name,
        forward_tflops=round(flops / forward_s / 1e12, 1),
        backward_tflops=round(2.5 * flops / backward_s / 1e12, 1),
        ms=ms,
    )


# ------------------------------------------------------------------ steps of the 1.17B model


def make_engine(bench: Bench, options, rows: int, accumulation: int) -> tuple[RunConfig, Engine]:
    cfg, model = bench.model()
    tree = cfg.model_dump()
    tree["engine"]["compile"] = options.compiled
    tree["train"] |= {
        "batch_size": rows,
        "batch_tokens": rows * accumulation * cfg.model.seq_len,
        "grad_accum": None,
    }
    cfg = check_config(tree, "the check's config")
    if options.way == BF16_RESIDUAL:
        embed = model.embed.forward
        model.embed.forward = lambda ids: embed(ids).to(torch.bfloat16)
    if options.way == BLOCK_BY_BLOCK:
        wrap_model(model, cfg.engine, world_size=2)
        return cfg, TorchEngine(cfg, World(device=bench.device), model)
    return cfg, build_engine(cfg, World(device=bench.device), model)


def kernels_of(options, cfg: RunConfig) -> AbstractContextManager:
    if options.kernel == "flash":
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    return training_kernels(cfg.model, cfg.data.document_mask)


def step(bench: Bench, options) -> None:
    """Tokens a second, MFU, memory beside what was planned, and how long the first step takes."""
    rows, accumulation, n = (
        (2, 2, 2) if bench.tiny else (options.rows, options.accumulation, options.steps)
    )
    bench.forget_peak()
    cfg, engine = make_engine(bench, options, rows, accumulation)
    tokens = rows * accumulation * cfg.model.seq_len
    updates, times, forward_times = [], [], []

    def take(seed: int) -> None:
        batches = [
            random_batch(cfg.model.vocab_size, rows, cfg.model.seq_len, 100 * seed + i)
            for i in range(accumulation)
        ]
        times.append(
            bench.once(
                lambda: updates.append(engine.train_step(batches, tokens, 1e-4, math.isfinite))
            )
        )
        forward_times.append(engine.forward_clock.take())

    with kernels_of(options, cfg):
        for seed in range(n + 2):
            take(seed)
        if options.profile:
            profile(bench, lambda: take(n + 2))
        kernel = attention_kernel(cfg.model, cfg.engine.precision, bench.device, False)
    rate, first_s = tokens / statistics.median(times[2 : n + 2]), times[0]
    peak, planned = (
        bench.peak_gib(),
        memory_of(cfg, 1, torch.device(bench.device).type).total / 2**30,
    )
    bench.tell(
        "step",
        rows=rows,
        accumulation=accumulation,
        compiled=options.compiled,
        way=options.way,
        kernel=kernel,
        tokens_per_s=round(rate),
        **utilisation(bench, cfg, rate),
        step_s=[round(s, 4) for s in times[2:]],
        forward_s=round(statistics.median(forward_times[2:]), 4),
        first_s=round(first_s, 1),
        loss=[round(update.loss, 4) for update in updates],
        peak_gib=peak,
        planned_gib=round(planned, 2),
        reserved_gib=None if bench.tiny else round(torch.cuda.max_memory_reserved() / 2**30, 2),
        gpu=gpu_state(),
    )


def utilisation(bench: Bench, cfg: RunConfig, rate: float) -> dict[str, float | None]:
    """Of the device's bf16 peak, where that is known; exact-causal, and as PaLM counts it."""
    peak = None if bench.tiny else peak_flops(torch.cuda.get_device_name(0))
    counts = {"mfu": flops_per_token(cfg.model), "palm_mfu": palm_flops_per_token(cfg.model)}
    return {name: peak and round(rate * flops / peak, 4) for name, flops in counts.items()}


def gpu_state() -> str | None:
    """Clock, power, temperature and what holds the clock back, just now."""
    if not shutil.which("nvidia-smi"):
        return None
    fields = "clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active"
    words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


KINDS = {
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas"),
    "attention": ("sdpa", "flash", "fmha", "cudnn_generated"),
    "fused by inductor": ("triton_",),
    "optimizer": ("multi_tensor", "adam"),
    "copies": ("Memcpy", "Memset"),
}


def profile(bench: Bench, work) -> None:
    """Milliseconds of a step by kinds of kernels, and the longest kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(
        activities=[ProfilerActivity.CPU, *(() if bench.tiny else (ProfilerActivity.CUDA,))]
    ) as seen:
        work()
    field = "self_cpu_time_total" if bench.tiny else "self_device_time_total"
    kind = torch.autograd.DeviceType.CPU if bench.tiny else torch.autograd.DeviceType.CUDA
    events = [
        (getattr(e, field) / 1e3, e.count, e.key)
        for e in seen.key_averages()
        if e.device_type == kind
    ]
    whole = sum(ms for ms, *_ in events)
    parts = {
        name: round(sum(ms for ms, _, key in events if any(w in key for w in words)), 2)
        for name, words in KINDS.items()
    }
    longest = [
        (round(ms, 2), count, key[:90]) for ms, count, key in sorted(events, reverse=True)[:18]
    ]
    parts["other"] = round(whole - sum(parts.values()), 2)
    bench.tell(
        "profile",
        ms=round(whole, 2),
        parts=parts,
        kernels=sum(count for _, count, _ in events),
        longest=longest,
    )


def memory(bench: Bench, options) -> None:
    """What train.batch_size: auto tries, against what a step of two micro-batches takes."""
    rows = 2 if bench.tiny else options.rows
    cfg, engine = make_engine(bench, options, rows, 2)
    batches = [
        random_batch(cfg.model.vocab_size, rows, cfg.model.seq_len, seed) for seed in range(2)
    ]
    with kernels_of(options, cfg) if not bench.tiny else nullcontext():
        bench.forget_peak()
        engine.try_out(batches[0])
        tried = bench.peak_gib()
        bench.forget_peak()
        engine.train_step(batches, 2 * rows * cfg.model.seq_len, 1e-4, math.isfinite)
    bench.tell(
        "memory",
        rows=rows,
        compiled=options.compiled,
        tried_gib=tried,
        stepped_gib=bench.peak_gib(),
    )


# ------------------------------------------------------------------ saving


def save(bench: Bench, _) -> None:
    """How long an asynchronous save stops training, and whether steps are slower meanwhile."""
    cfg, model = bench.model()
    del model
    rows, T, every, n = (
        (2, cfg.model.seq_len, 3, 8) if bench.tiny else (16, cfg.model.seq_len, 12, 30)
    )
    with temporary_folder() as root:
        sections = make_dataset(root, T, 2 * rows * T * (n + 2))
        taken = {
            "lr": 1e-4,
            "batch_size": rows,
            "batch_tokens": 2 * rows * T,
            "total_step_budget": 200,
            "warmup_steps": 5,
            "eval_every": 0,
        }
        engine = {
            "zero_stage": 0,
            "precision": cfg.engine.precision,
            "compile": False,
            "device": torch.device(bench.device).type,
        }
        checkpoint = sections["checkpoint"] | {
            "run_name": "save",
            "save_every": every,
            "keep_last": 1,
            "keep_best": 0,
        }
        run = sections | {
            "model": cfg.model.model_dump(mode="json"),
            "train": taken,
            "engine": engine,
            "checkpoint": checkpoint,
        }
        code, said = train(
            run | {"log": {"log_every": 1, "tensorboard": False}}, root, "--steps-today", str(n)
        )
        logs = root / "checkpoints/save/logs/metrics.jsonl"
        records = (
            [json.loads(line) for line in logs.read_text().splitlines()] if logs.exists() else []
        )
    shown = [
        (r["step"], round(r["time/step_s"], 3), round(r["time/saving_share"], 3))
        for r in records
        if "time/step_s" in r
    ]
    wrong = {} if code == 0 and len(shown) == n else {"failed": said[-1500:]}
    host_gb = [r["memory/host_gb"] for r in records if "memory/host_gb" in r][-1:]
    bench.tell("save", code=code, step_s_and_share_of_saving=shown, host_gb=host_gb, **wrong)


if __name__ == "__main__":
    main()
