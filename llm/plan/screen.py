"""What a person reads of a plan, and the same as plain data."""

from dataclasses import asdict

from llm.config import RunConfig
from llm.model.flops import count_params, flops_per_token, palm_flops_per_token
from llm.plan.candidates import Candidate
from llm.plan.hardware import GIB, USABLE
from llm.plan.memory import Memory
from llm.plan.work import Disk, Work, evaluation_flops

KINDS = ("weights", "masters", "gradients", "moments", "activations", "buffers")
HEADS = ("weights", "masters", "grads", "moments", "activ.", "buffers")


def model_lines(cfg: RunConfig) -> list[str]:
    exact, palm = flops_per_token(cfg.model), palm_flops_per_token(cfg.model)
    return [
        f"model: {cfg.model.model_name}, {count_params(cfg.model):,} parameters, vocabulary {cfg.model.vocab_size:,}, rows of {cfg.model.seq_len:,}",
        f"FLOPs a token: {exact / 1e9:.3f} G (causal attention), {palm / 1e9:.3f} G as PaLM counts",
    ]


def table(rows: list[Candidate], best: Candidate | None, configured: Candidate | None) -> list[str]:
    """Memory in GiB and speed of each row; > is the one to take, c the config as it is."""
    device = rows[0].cluster.device
    numbers = "".join(f"{head:>9}" for head in HEADS)
    lines = [f"   ZeRO  ckpt rows x acc{numbers}    total  of {device.usable / GIB:.1f}   s/step   tokens/s   comm."]
    return lines + [_row(c, mark=(">" if c is best else " ") + ("c" if c is configured else " ")) for c in rows]


def _row(c: Candidate, mark: str) -> str:
    stage, offload = c.row
    parts = "".join(f"{getattr(c.memory, kind) / GIB:9.2f}" for kind in KINDS)
    share = c.memory.total / c.cluster.device.usable
    verdict = f"{share:6.0%}  " if c.fits else f"{share:6.0%} !"
    seconds = f"{c.time.total:8.3g}" if c.time.total < 999 else f"{c.time.total:8,.0f}"
    speed = f"{seconds} {c.tokens_per_s:10,.0f} {c.time.communication_share:6.1%}"
    name = f"{stage}{'+off' if offload else ''}"
    batch = f"{c.plan.micro_rows:4} x {c.plan.accumulation:<4}"
    return f"{mark} {name:>5} {c.share:>5} {batch}{parts}{c.memory.total / GIB:9.2f}{verdict} {speed}"


def run_lines(c: Candidate, work: Work, disk: Disk, hours_a_day: float | None, price: float | None) -> list[str]:
    """The whole run with this row: hours, sittings, money, disk."""
    hours = run_hours(c, work)
    ranks = c.cluster.ranks
    stage, offload = c.row
    flags = f"engine.zero_stage={stage} train.batch_size={c.plan.micro_rows} engine.activation_checkpointing={c.share}"
    text = f"{span(hours)} for {work.steps:,} steps of {c.plan.tokens:,} tokens, {_amount(work.tokens)} in all"
    passes = f", {work.passes:.2f} passes over the data" if work.passes else ""
    cost = f", {hours * ranks * price:,.2f} at {price:g} an hour" if price else ""
    lines = [
        f"take: {flags}{' engine.offload=true' if offload else ''}",
        f"time: {text}{passes}",
    ]
    if c.cluster.device.kind == "cuda" or price:
        lines.append(f"GPU hours: {hours * ranks:,.2f}{cost}")
    if hours_a_day:
        lines.append(f"sittings: {max(1, -(-hours // hours_a_day)):.0f} of {hours_a_day:g} hours a day (--minutes-today {60 * hours_a_day:.0f})")
    lines.append(f"disk: {_size(disk.total)}: {disk.count} checkpoints of {_size(disk.checkpoint)} at most, {_size(disk.dataset)} of token shards")
    if c.memory.host:
        lines.append(f"host memory: {_size(c.memory.host * min(ranks, c.cluster.per_node))} a machine, beside the system's")
    return lines


def run_hours(c: Candidate, work: Work) -> float:
    checks = evaluation_flops(c.cfg, work, flops_per_token(c.cfg.model)) / (c.cluster.device.flops * c.mfu * c.cluster.ranks)
    return (work.steps * c.time.total + checks) / 3600


def assumption_lines(c: Candidate, mfu_is_measured: bool) -> list[str]:
    device = c.cluster.device
    rate = f"{c.mfu:.1%} of {device.flops / 1e12:,.4g} TFLOP/s" if device.kind == "cuda" else f"{c.mfu * device.flops / 1e9:,.0f} GFLOP/s a process"
    lines = [f"{'measured here' if mfu_is_measured else 'assumed'}: {rate} (--mfu, or --measure where such a device is)"]
    memory = f"{USABLE:.0%} of {device.memory / GIB:,.1f} GiB"
    lines.append(f"assumed: tensors may have {memory}; the rest is the driver's, the libraries' and lost in gaps")
    if c.cfg.engine.precision == "fp32" and device.kind == "cuda" and not mfu_is_measured:
        lines.append("engine.precision fp32: the bf16 peak is out of reach, so the time is too short; --mfu 0.1 is nearer")
    if c.cluster.ranks > 1:
        lines.append(
            f"model, not measured: communication at {device.node_link / 1e9:g} GB/s in a machine"
            + (f", {device.network / 1e9:g} GB/s between the {c.cluster.nodes} machines (--network)" if c.cluster.nodes > 1 else "")
        )
    return lines


def measured_lines(predicted: Memory, counted: dict) -> list[str]:
    """Planned beside counted bytes."""
    lines = [f"{'MiB':12} {'planned':>12} {'counted':>12} {'difference':>11}"]
    pairs = [(kind, getattr(predicted, kind), counted[kind]) for kind in KINDS if kind in counted]
    for kind, plan, count in [*pairs, ("peak", predicted.total, counted["peak"])]:
        numbers = f"{count / 2**20:12,.1f} {plan / count - 1:+10.1%}" if count else f"{'none' if count == 0 else 'not seen':>12}"
        lines.append(f"{kind:12} {plan / 2**20:12,.1f} {numbers}")
    lines.append(f"the process had {counted['process'] / 2**20:,.1f} MiB at most, {counted['process_before'] / 2**20:,.1f} before there was a model")
    return lines


def as_data(c: Candidate) -> dict:
    stage, offload = c.row
    return {
        "device": c.cluster.device.name, "ranks": c.cluster.ranks, "zero_stage": stage, "offload": offload,
        "activation_checkpointing": c.cfg.engine.activation_checkpointing,
        "micro_rows": c.plan.micro_rows, "accumulation": c.plan.accumulation, "tokens_per_step": c.plan.tokens, "fits": c.fits,
        "bytes": asdict(c.memory) | {"total": c.memory.total, "usable": c.cluster.device.usable},
        "step_seconds": asdict(c.time) | {"total": c.time.total}, "tokens_per_s": c.tokens_per_s,
        "communication_share": c.time.communication_share,
    }  # fmt: skip


def span(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} seconds"
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:,.1f} hours" if hours < 48 else f"{hours / 24:,.1f} days"


def _amount(tokens: int) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= factor:
            return f"{tokens / factor:.4g}{unit}"
    return f"{tokens}"


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:,.4g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.4g} TiB"
