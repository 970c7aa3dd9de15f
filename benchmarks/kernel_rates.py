"""How fast are the parts of a step by themselves, and how near to the rate of a large product of matrices?

  OMP_NUM_THREADS=1 python benchmarks/kernel_rates.py --config configs/toy.yaml
  python benchmarks/kernel_rates.py --config configs/gpt-1b.yaml --device cuda --out build/kernels.json

Products at the model's shapes, forward and both gradients; attention, norm, loss and AdamW forward and backward. Times are the best of
--rounds, of the CPU on a CPU (so run it with one thread), else of the clock. The random numbers stand where a step would have its own.
"""

import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from machine import machine, write_json
from step import changed, synchronize

from llm import cli
from llm.config import ModelConfig, load_config
from llm.engine.precision import measure_rates
from llm.engine.process import keep_freed_memory
from llm.log import log
from llm.model import products
from llm.model.attention import ATTENTION
from llm.model.layers import RMSNorm
from llm.model.loss import take_loss, take_loss_in_slices

ROWS_OF_LOGITS = 1024


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_config()
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="of which the best counts (%(default)s)")
    parser.add_argument("--compiled", action="store_true", help="norm, attention and loss compiled too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    args = parser.parse_args()
    cfg = load_config(args.config, args.overrides, preset=args.model)
    cfg = changed(cfg, model={"vocab_size": cfg.model.with_vocab(4100).vocab_size})
    torch.set_flush_denormal(True)
    if args.device == "cpu":
        keep_freed_memory()
    torch.set_default_device(args.device)
    clock, found = Clock(args.device, args.rounds), []
    dtypes = [torch.float32, torch.bfloat16]
    if measure_rates(args.device).fastest == "fp32":
        log.info("bf16 is left out: this machine emulates it")
        dtypes.remove(torch.bfloat16)
    for dtype in dtypes:
        peak = clock.rate(large_product(dtype, args.device))
        rows = [("large product", peak), *matmuls(cfg.model, cfg.train.batch_size * cfg.model.seq_len, dtype, clock)]
        rows += [(name, clock.rate(part)) for name, part in parts(cfg.model, cfg.train.batch_size, dtype, args.compiled)]
        for name, rate in rows:
            found.append({"dtype": str(dtype), "part": name, "rate": rate, "of_large_product": rate / peak})
            share = f"  {rate / peak:4.0%}" if "elements" not in name else ""
            print(f"{str(dtype)[6:]:9} {name:48} {rate / 1e9:9,.1f} G/s{share}", flush=True)
    elements = 1 << 24
    print(f"{'float32':9} {'AdamW, elements':48} {clock.rate(adamw(elements)) / 1e9:9,.2f} G/s")
    write_json({"rates": found, "machine": machine(["torch"]), "device": args.device, "threads": torch.get_num_threads()}, args.out)


class Clock:
    def __init__(self, device: str, rounds: int):
        self.device, self.rounds = device, rounds
        self.now = time.process_time if device == "cpu" else time.perf_counter

    def rate(self, part: tuple[float, Callable]) -> float:
        """Units of work in a second, of (units, what does them)."""
        units, work = part
        best = float("inf")
        for _ in range(self.rounds + 1):
            synchronize(self.device)
            began = self.now()
            work()
            synchronize(self.device)
            best = min(best, self.now() - began)
        return units / best


def large_product(dtype: torch.dtype, device: str) -> tuple[float, Callable]:
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    return 2 * n**3, lambda: products.times_transposed(a, b)


def matmuls(m: ModelConfig, n_rows: int, dtype: torch.dtype, clock: Clock):
    """(name, FLOP/s) of the products of each linear map, y, dx and dw together; for fp32 with and without oneDNN where that is used."""
    fused = 2 if m.mlp == "swiglu" else 1
    shapes = {
        "qkv": (n_rows, m.d_model, (m.n_heads + 2 * m.n_kv_heads) * m.d_head), "attention out": (n_rows, m.n_heads * m.d_head, m.d_model),
        "MLP up": (n_rows, m.d_model, fused * m.d_ff), "MLP down": (n_rows, m.d_ff, m.d_model), "head": (ROWS_OF_LOGITS, m.d_model, m.vocab_size),
    }  # fmt: skip
    for name, (n, k, width) in shapes.items():
        x, weight, grad = torch.randn(n, k, dtype=dtype), torch.randn(width, k, dtype=dtype), torch.randn(n, width, dtype=dtype)

        def three(x=x, weight=weight, grad=grad):
            products.linear(x, weight, None)
            products.times_transposed(grad, weight.T)
            products.weight_gradient(grad, x)

        yield f"{name} {n} x {k} x {width}", clock.rate((6 * n * k * width, three))
        if products.ONEDNN and dtype == torch.float32:
            with mock.patch.object(products, "ONEDNN", False):
                yield f"{name}, by MKL", clock.rate((6 * n * k * width, three))


def parts(m: ModelConfig, batch: int, dtype: torch.dtype, compiled: bool):
    """(name, (units, work)): attention in FLOPs of the causal half, the others in elements."""
    forms = {"": lambda f: f} | ({", compiled": lambda f: torch.compile(f, dynamic=False)} if compiled else {})
    shape = (batch, m.seq_len, m.n_heads, m.d_head)
    qkv = [torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    y_grad = torch.randn(shape, dtype=dtype).transpose(1, 2)
    flops = 6 * batch * m.n_heads * m.seq_len * (m.seq_len + 1) * m.d_head
    logits, targets = torch.randn(ROWS_OF_LOGITS, m.vocab_size).to(dtype), torch.randint(0, m.vocab_size, (ROWS_OF_LOGITS,))
    x, norm = torch.randn(batch, m.seq_len, m.d_model, dtype=dtype, requires_grad=True), RMSNorm(m.d_model, 1e-5)
    for form, wrap in forms.items():
        for name, attend in ATTENTION.items():
            attend = wrap(attend)
            yield f"attention: {name}{form}", (flops, lambda attend=attend: torch.autograd.grad(attend(*qkv), qkv, y_grad))
        wrapped = wrap(norm)
        yield f"RMSNorm, elements{form}", (x.numel(), lambda wrapped=wrapped: torch.autograd.grad(wrapped(x).sum(), [x, norm.weight]))
        loss = wrap(take_loss) if form else take_loss_in_slices
        yield f"loss and its gradient, elements{form}", (logits.numel(), lambda loss=loss: loss(logits, targets, 0.0, None, True))


def adamw(elements: int) -> tuple[float, Callable]:
    weight = torch.randn(elements, requires_grad=True)
    weight.grad = torch.randn(elements)
    return elements, torch.optim.AdamW([weight], fused=True).step


if __name__ == "__main__":
    cli.run(main)
