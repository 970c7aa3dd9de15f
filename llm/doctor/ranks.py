"""What several ranks find out together: same answers, right sums, how fast they talk. Each call is collective."""

import hashlib
import socket
import time
from collections import Counter

import torch

from llm.config import RunConfig, check_config
from llm.dist import World
from llm.doctor.line import FAIL, OK, WARN, Line
from llm.engine.deepspeed_engine import check_deepspeed

ROUNDS = 3
VALUES = {"cpu": 4 << 20, "cuda": 64 << 20}  # of an all-reduce, fp32
SLOW = {"cpu": 0.1e9, "cuda": 5e9}  # bytes a second of an all-reduce: a gigabit network, PCIe
SIZE = 512  # of the matrices


def ranks(world: World) -> Line:
    hosts = world.gather(socket.gethostname())
    kind = f"NCCL and gloo, {torch.cuda.get_device_name()}" if world.device.startswith("cuda") else "gloo, cpu"
    return Line("ranks", OK, f"{world.size} on {len(set(hosts))} host{'s' * (len(set(hosts)) > 1)} ({', '.join(sorted(set(hosts)))}), {kind}")


def products(device: str) -> list[torch.Tensor]:
    """Products of the same matrices on every rank: of whole numbers, exact in fp32 and TF32, then of fractions in fp32 and in bf16."""
    random = torch.Generator().manual_seed(0)
    whole = torch.randint(-8, 8, (2, SIZE, SIZE), generator=random).float().to(device)
    a, b = torch.randn(2, SIZE, SIZE, generator=random).to(device)
    return [(x @ y).cpu() for x, y in ((whole[0], whole[1]), (a, b), (a.bfloat16(), b.bfloat16()))]


def matmul(world: World) -> Line:
    """Whether each rank multiplies right, and all of one kind of device to the same bits."""
    random = torch.Generator().manual_seed(0)
    whole = torch.randint(-8, 8, (2, SIZE, SIZE), generator=random)
    got = products(world.device)
    digest = hashlib.sha256(b"".join(x.view(torch.uint8).numpy().tobytes() for x in got)).hexdigest()[:12]
    kind = torch.cuda.get_device_name() if world.device.startswith("cuda") else "cpu"
    answers = world.gather([bool((got[0] == whole[0] @ whole[1]).all()), kind, digest])
    wrong = [rank for rank, (right, _, _) in enumerate(answers) if not right]
    usual = {kind: Counter(d for _, k, d in answers if k == kind).most_common(1)[0][0] for _, kind, _ in answers}
    odd = [rank for rank, (_, kind, d) in enumerate(answers) if d != usual[kind] and rank not in wrong]
    if wrong:
        advice = "Do not train there: that processor or its memory is broken, or a library on it. Try again without that machine."
        return Line("matmul", FAIL, f"wrong products on {_named(wrong, world)}", advice)
    if odd:
        advice = "Runs would not repeat: look for other library versions or settings there, then at the hardware."
        return Line("matmul", FAIL, f"other bits than the rest on {_named(odd, world)}", advice)
    mixed = len(usual) > 1
    found = f"right, and the same bits on all ranks ({usual[kind]})" if not mixed else f"right, on {' and '.join(sorted(usual))}"
    return Line("matmul", WARN if mixed else OK, found, "Ranks on different devices round differently.")


def all_reduce(world: World) -> Line:
    """A sum that each rank can check, and the bytes a second that a ring would carry: 2 (n - 1) / n of the data each way."""
    kind = world.device.partition(":")[0]
    n = VALUES[kind]
    pattern = (torch.arange(n) % 64).float().to(world.device)
    expected, seconds, right = pattern * sum(range(1, world.size + 1)), [], True
    for _ in range(ROUNDS):
        mine = pattern * (world.rank + 1)
        world.barrier()
        started_at = time.perf_counter()
        world.sum_tensor(mine)
        right &= bool((mine == expected).all())  # waits for the device as well
        seconds.append(time.perf_counter() - started_at)
    wrong = [rank for rank, ok in enumerate(world.gather(right)) if not ok]
    if wrong:
        return Line("all-reduce", FAIL, f"wrong sums on {_named(wrong, world)}", "Do not train: the network, a driver or NCCL loses or changes data.")
    rate = 2 * (world.size - 1) / world.size * 4 * n / min(seconds)
    slow = rate < SLOW[kind]
    advice = "Check NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and the links; ZeRO and DDP send each gradient in every step."
    return Line("all-reduce", WARN if slow else OK, f"right sums, {rate / 1e9:,.2f} GB/s for {4 * n / 1e6:,.0f} MB", advice)


def zero(world: World, cfg: RunConfig | None) -> Line:
    """DeepSpeed takes two steps of a tiny model on these ranks, and every weight and moment is compared with plain AdamW's."""
    stage = (cfg.engine.zero_stage if cfg else 1) or 1
    cfg = cfg or check_config(_ANY, "the doctor's own config")
    check_deepspeed(cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"zero_stage": stage})}), world)
    return Line("zero", OK, f"ZeRO-{stage} steps as AdamW does, and its slices can be saved and loaded")


_ANY = {
    "model": {"n_layers": 1, "d_model": 8, "n_heads": 1, "d_ff": 8, "seq_len": 8, "vocab_size": 128},
    "tokenizer": {"tokenizer_path": "none"}, "data": {"data_path": "none"}, "train": {"lr": 1e-3, "batch_size": 1},
    "checkpoint": {"run_name": "none"},
}  # fmt: skip


def _named(ranks: list[int], world: World) -> str:
    hosts = world.gather(socket.gethostname())
    return ", ".join(f"rank {rank} ({hosts[rank]})" for rank in ranks)
