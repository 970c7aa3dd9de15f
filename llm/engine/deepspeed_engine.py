"""ZeRO stages 1 to 3 by DeepSpeed, with or without the optimizer in host memory. The only file that imports deepspeed, and only when used.

DeepSpeed keeps the fp32 weights that AdamW moves in flat partitions, one per parameter group (stages 1 and 2) or sub-group (stage 3).
Where a parameter lies in them is said by private attributes only; `check_deepspeed` proves at start-up that they still mean what this
file takes them to mean. Read from the sources of 0.19.8.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from llm.checkpoint.slices import KINDS, Slice
from llm.config import RunConfig
from llm.data.stream import Batch
from llm.dist import World
from llm.engine.ds_check import refuse_if_its_word
from llm.engine.ds_config import ds_config_path, load_ds_config
from llm.engine.optimizer import adam_step, build_adamw, create_moments, set_adam_step, set_lr
from llm.engine.protocol import EngineError, ForwardClock, Reader, Update, autocast, count_targets, global_sums, model_inputs, named_shapes

TESTED = "0.19"
ROUNDING = ("communication_data_type", "data_types")
"""What may be rounded on purpose: the start-up check, which compares every element, goes without."""


class DeepSpeedEngine:
    no_varlen = ""

    def __init__(self, cfg: RunConfig, world: World, model: nn.Module, left_out: tuple[str, ...] = ()):
        """`left_out`: keys of the JSON that do not count this time."""
        self.world, self.stage, self.offload = world, cfg.engine.zero_stage, cfg.engine.offload
        self.precision = cfg.engine.precision
        self.params = named_shapes(model)
        self.named = list(model.named_parameters())
        self.adamw = build_adamw(model, cfg.train)
        self.engine = initialize(cfg, world, model, self.adamw, left_out)
        self.zero = self.engine.optimizer
        self.forward_clock = ForwardClock(world.device)
        create_moments(self.adamw, self._flats())

    def train_step(self, micro_batches: list[Batch], n_targets: int, lr: float, accept: Callable[[float], bool]) -> Update:
        assert n_targets > 0
        rank_losses = []
        for i, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            with self.forward_clock:
                loss = self._loss(batch)
            scaled = loss * (self.world.size / n_targets)  # DeepSpeed averages over ranks; the global mean needs their sum
            self.engine.backward(scaled, scale_wrt_gas=False)
            rank_losses.append(loss.detach())
        loss = global_sums(rank_losses, self.world)[0] / n_targets
        if not accept(loss):
            self._spoil_gradients()
        set_lr(self.adamw, lr)
        self.engine.step()
        applied = self.engine.was_step_applied()
        return Update(loss, float(self.engine.get_global_grad_norm()) if applied else math.nan, applied)

    def _spoil_gradients(self) -> None:
        """Make a gradient not finite: DeepSpeed then skips the step and drops all gradients itself, in each stage in its own way."""
        if self.world.rank:  # one is enough, and other ranks may hold padding, which nothing would overwrite
            return
        if self.offload:  # these norms were taken as the gradients travelled to the host, and are what step() judges by
            self.zero.norm_for_param_grads = dict.fromkeys(self.zero.norm_for_param_grads, torch.tensor(math.nan))
        else:
            self.zero.averaged_gradients[0][0].fill_(math.nan)

    def drop_gradients(self) -> bool:
        return False  # they lie in buckets that a failed backward leaves in the middle of something

    def try_out(self, batch: Batch) -> None:
        with autocast(self.precision, self.world.device):  # past DeepSpeed, which would count this among its steps
            loss = self.engine.module(**model_inputs(batch, self.world.device, self.no_varlen is None))
        torch.autograd.grad(loss, [p for _, p in self.named])  # and not backward, whose hooks would reduce

    def _loss(self, batch: Batch) -> torch.Tensor:
        return self.engine(**model_inputs(batch, self.world.device, self.no_varlen is None))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        self.engine.eval()
        loss = self._loss(batch).item()
        self.engine.train()
        return loss, count_targets(batch)

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.stage < 3:
            return ((name, p.detach()) for name, p in self.named)
        return ((name, self._gathered(p)) for name, p in self.named)

    def _gathered(self, parameter: nn.Parameter) -> torch.Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def local_slices(self) -> Iterator[Slice]:
        for name, flat, at, start, numel in self._fragments():
            for kind in KINDS:
                yield Slice(name, kind, start, self._tensor(flat, kind)[at : at + numel])

    def load_slices(self, reader: Reader) -> None:
        if self.stage == 3:
            self.zero.checkpoint_event_prologue()  # frees gathered weights; else small ones, which stay gathered, keep their old values
        for name, flat, at, start, numel in self._fragments():
            for kind in KINDS:
                self._tensor(flat, kind)[at : at + numel].copy_(reader.read(name, kind, start, numel))
        self._refresh_model()

    def _refresh_model(self) -> None:
        """Bring the weights that the model computes with up to the fp32 partitions. Collective."""
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for sub_group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        self.zero.checkpoint_event_epilogue()

    def _flats(self) -> list[torch.Tensor]:
        """This rank's flat fp32 partitions, which AdamW moves."""
        return self.zero.single_partition_of_fp32_groups if self.stage < 3 else self.zero.fp32_partitioned_groups_flat

    def _tensor(self, flat: torch.Tensor, kind: str) -> torch.Tensor:
        return flat.detach() if kind == "fp32" else self.adamw.state[flat][kind]

    def _fragments(self) -> Iterator[tuple[str, torch.Tensor, int, int, int]]:
        """(name, flat partition, offset in it, start in the parameter, element count) of all that this rank owns, without padding."""
        return self._fragments_of_groups() if self.stage < 3 else self._fragments_of_parameters()

    def _fragments_of_groups(self):
        """Stages 1 and 2: a group's parameters lie end to end, and each rank owns one even cut of the whole."""
        zero, names = self.zero, {id(p): name for name, p in self.named}
        for group, flat in enumerate(self._flats()):
            size = zero.partition_size[group]
            first = self.world.rank * size
            positions = zip(
                zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group], zero.round_robin_bit16_meta[group], strict=True
            )
            for p, position, meta in positions:
                begin, stop = max(position, first), min(position + meta.numel(), first + size)
                if begin < stop:
                    yield names[id(p)], flat, begin - first, begin - position, stop - begin

    def _fragments_of_parameters(self):
        """Stage 3: each parameter is cut evenly by itself; the last rank's part ends in padding."""
        for name, p in self.named:
            sub_group, offset, size = self.zero.grad_position[self.zero.get_param_id(p)]
            start = self.world.rank * size
            numel = min(size, p.ds_numel - start)
            if numel > 0:
                yield name, self._flats()[sub_group], offset, start, numel

    def state(self) -> dict:
        return {"optimizer_step": adam_step(self.adamw)}

    def load_state(self, state: dict) -> None:
        set_adam_step(self.adamw, state["optimizer_step"])


def import_deepspeed(world: World):
    """The library, told first what it would otherwise guess: its accelerator, and that no process group needs to be made."""
    device = torch.device(world.device)
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"DeepSpeed does not run on {world.device}. Use engine.zero_stage=0, or engine.device=cpu.")
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(world.local_rank if device.index is None else device.index)  # to DeepSpeed, the device's number
    if not dist.is_initialized():  # it wants one even for one process
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ on a CPU, for inference only
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # it calls renamed collectives, each call a warning
    return deepspeed


def initialize(
    cfg: RunConfig, world: World, model: nn.Module, optimizer: torch.optim.Optimizer, left_out: tuple[str, ...] = ()
):
    """DeepSpeed's own engine around `model`. Collective."""
    deepspeed = import_deepspeed(world)
    config = load_ds_config(cfg, world, sum(p.numel() for p in model.parameters()))
    config = {key: value for key, value in config.items() if key not in left_out}
    if cfg.engine.zero_stage == 3:  # whole blocks are gathered, not their layers one by one: fewer hooks, none inside a compiled block
        deepspeed.utils.set_z3_leaf_modules(model, list({type(block) for block in model.blocks}))
        if cfg.engine.compile:
            deepspeed.runtime.zero.linear.LinearFunctionForZeroStage3 = _Linear
    try:
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    except Exception as error:
        if cfg.engine.ds_config:
            refuse_if_its_word(error, config, str(ds_config_path(cfg.engine)))
        raise


class _Linear(torch.autograd.Function):
    """DeepSpeed's linear map for stage 3, which keeps the weight itself and no view of it that would hold its memory, fit to be compiled.

    Its own adds the bias in place, for which torch 2.11 compiles gradients of zero without a word; `y.to(y.dtype)` would do the same.
    It also asks whether the weight is gathered, which those of leaf modules are, by its ds_id: torch 2.11 and 2.12 compile each block
    anew for that, and give up after eight.
    """

    @staticmethod
    def forward(ctx, x, weight, bias=None):
        device = x.device.type
        ctx.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ctx.save_for_backward(x, weight, bias)
        y = x @ weight.T
        return y if bias is None else y + bias.to(y.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        with torch.autocast(grad.device.type, ctx.autocast, enabled=ctx.autocast is not None):
            grad_NM, x_NK = grad.flatten(0, -2), x.flatten(0, -2)
            return grad @ weight, grad_NM.T @ x_NK, None if bias is None else grad_NM.sum(dim=0)


# ---------------------------------------------------------------- the start-up check


class _ProbeBlock(nn.Module):
    """Odd sizes in both weight-decay groups; no matmul, which autocast would round."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(5, 3))
        self.vector = nn.Parameter(torch.zeros(7))

    def forward(self, x):
        weights = torch.cat([self.matrix.flatten(), self.vector])
        return x * (weights * torch.arange(1, 23, device=x.device)).sin().sum()


class _Probe(nn.Module):
    """A model whose gradient differs in every element, so that a misplaced one shows."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([_ProbeBlock()])
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BT, targets_BT):
        return (self.blocks[0](self.scale.cos() * tokens_BT.float()) - targets_BT).sum()


class _Pattern:
    """A reader in which every element of every kind is different."""

    def read(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        return (1 + len(name) % 5 + 10 * KINDS.index(kind)) / 10 + torch.arange(start, start + numel) / 320


def check_deepspeed(cfg: RunConfig, world: World) -> None:
    """Prove on a tiny model that slices reach DeepSpeed's weights, moments and step, or raise EngineError. Collective."""
    world.together(lambda: _check_deepspeed(cfg, world))


def _check_deepspeed(cfg: RunConfig, world: World) -> None:
    version, path = import_deepspeed(world).__version__, cfg.engine.ds_config
    if not (trouble := _agreed_trouble(cfg, world)):
        return
    shipped = cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"ds_config": None})})
    if path and not _agreed_trouble(shipped, world):
        raise EngineError(
            f"{path}: with it DeepSpeed {version} comes to other weights than plain AdamW at ZeRO stage {cfg.engine.zero_stage}, and with "
            f"{ds_config_path(shipped.engine)} to the same: {trouble}. Take out what that file does not have, or leave engine.ds_config out."
        )
    raise EngineError(
        f"DeepSpeed {version} failed Tally's start-up check at ZeRO stage {cfg.engine.zero_stage}, so its weights and "
        f"moments could not be saved or loaded: {trouble}. Tally was tested with deepspeed {TESTED}: pip install "
        f"'deepspeed=={TESTED}.*', or train without it: engine.zero_stage=0."
    )


def _agreed_trouble(cfg: RunConfig, world: World) -> str | None:
    """What the first rank that has trouble says of it, on every rank. Collective."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)  # one of the probe's steps is skipped on purpose, which it warns of
    try:
        trouble = _probe_trouble(cfg, world)
    except (AttributeError, LookupError, TypeError, ValueError, AssertionError, RuntimeError) as error:
        trouble = f"{type(error).__name__}: {error}"
    finally:
        logger.setLevel(level)
    return next((told for told in world.gather(trouble) if told), None)


def _probe_trouble(cfg: RunConfig, world: World) -> str | None:
    """What is wrong, in words: loads a pattern, makes a refused and an applied step, and compares every element with plain AdamW."""
    from llm.engine.torch_engine import TorchEngine

    probe = DeepSpeedEngine(cfg, world, _Probe(), left_out=ROUNDING)
    whole = TorchEngine(cfg, World(device=world.device), _Probe())
    batch = Batch(torch.ones(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64), doc_ids_BT=None, samples=np.zeros(1, np.int64))
    for engine, batches in ((probe, [batch]), (whole, [batch] * world.size)):
        engine.load_slices(_Pattern())
        engine.load_state({"optimizer_step": 3})
        applied = [engine.train_step(batches, 4 * world.size, 0.1, lambda _, verdict=v: verdict).applied for v in (False, True)]
        if applied != [False, True]:
            return f"of a refused and an accepted step, it applied {applied}"
    expected = {(s.name, s.kind): s.values for s in whole.local_slices()}
    owned = world.sum_ints([sum(s.values.numel() for s in probe.local_slices())])[0]
    if owned != sum(v.numel() for v in expected.values()):
        return f"all ranks' slices hold {owned} elements, the model {sum(v.numel() for v in expected.values())}"
    if probe.state() != whole.state():
        return f"after two steps its state is {probe.state()}, not {whole.state()}"
    for s in probe.local_slices():
        wanted = expected[s.name, s.kind][s.start : s.start + s.values.numel()]
        if not torch.allclose(s.values, wanted.to(s.values.device), rtol=1e-4):
            off = (s.values - wanted.to(s.values.device)).abs().max().item()
            return f"{s.key} is off by up to {off:.3g}"
    return None
