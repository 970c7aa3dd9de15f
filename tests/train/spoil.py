"""Runs whose numbers go bad in chosen steps, on chosen ranks, and what each rank's own memory holds before and after."""

import torch
from little_run import sit

from llm.checkpoint import folder
from llm.checkpoint.slices import Slice, state_hash
from llm.config import load_config
from llm.dist import World
from llm.log import UserError


class Died(BaseException):
    """Nothing is saved when it comes and no rank is told, as when the machine goes down: no Exception, which training would see to."""


def held(engine, parameters: dict) -> list[int]:
    """Hashes of the weights and moments that this rank owns, and of its replica of all weights, if it has one."""
    replica = [Slice(name, "fp32", 0, p.detach().view(-1)) for name, p in parameters.items() if not hasattr(p, "ds_tensor")]
    return [state_hash(engine.local_slices()), state_hash(replica)]


def spoil(world: World, config: str, overrides: list[str], fault: str, steps: list[int], die_at: int = 0, **options) -> dict:
    """A sitting with `fault` in the steps numbered `steps`; dies before the step `die_at`. What it did, or the error that ended it."""
    from llm.train import start as starting

    build, told = starting.build_engine, {"applied": {}, "untouched": {}}

    def spoiled(cfg, w, model):
        parameters = dict(model.named_parameters())
        engine = build(cfg, w, model)
        inner = engine.train_step
        done = iter(range(max((e.step for e in folder.entries(load_config(config).run_folder)), default=0) + 1, 10**6))

        def train_step(batches, *rest):
            step = next(done)
            if step == die_at:
                raise Died
            undo = FAULTS[fault](engine, parameters, batches, world) if step in steps else bool
            before = held(engine, parameters)
            update = inner(batches, *rest)
            told["applied"][step], told["untouched"][step] = update.applied, held(engine, parameters) == before
            undo()
            return update

        engine.train_step = train_step
        return engine

    starting.build_engine = spoiled
    try:
        told |= sit(world, config, overrides, **options)
    except Died:
        told["error"] = "died"
    except UserError as error:
        told |= {"error": str(error), "code": error.exit_code}
    finally:
        starting.build_engine = build
    return told


def loss_is_nan_on_rank_1(engine, parameters, batches, world):
    return _scale_loss(engine, float("nan")) if world.rank == 1 else bool


def loss_times_100(engine, parameters, batches, world):
    return _scale_loss(engine, 100.0)


def _scale_loss(engine, factor: float):
    inner = engine._loss
    engine._loss = lambda *args: inner(*args) * factor
    return lambda: setattr(engine, "_loss", inner)


def one_gradient_element_is_inf_on_rank_1(engine, parameters, batches, world):
    if world.rank != 1:
        return bool

    def to_inf(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[3] = torch.inf
        return gradient

    return parameters["blocks.0.attn.qkv.weight"].register_hook(to_inf).remove


def one_gradient_element_is_inf_on_rank_1_after_the_reduction(engine, parameters, batches, world):
    """As a flipped bit does: only plain torch keeps whole gradients on each rank."""
    if world.rank != 1:
        return bool
    inner = engine._update

    def update(*args):
        next(iter(parameters.values())).grad.view(-1)[5] = torch.inf
        return inner(*args)

    engine._update = update
    return lambda: setattr(engine, "_update", inner)


def an_embedding_weight_is_inf_on_one_rank(engine, parameters, batches, world):
    """For a token of this step: in rank 1's replica, or where ZeRO-3 keeps none in the partition that holds it."""
    weight, token = parameters["embed.weight"], world.gather(int(batches[0].tokens_BT[0, 0]))[1]
    flat = token * dict(engine.params)["embed.weight"][1]
    if not weight.numel():  # ZeRO-3, and not so small that it stays gathered
        share = weight.ds_tensor.numel()
        if flat // share == world.rank:
            weight.ds_tensor.data.view(-1)[flat % share] = torch.inf
    elif world.rank == 1:
        weight.data.view(-1)[flat] = torch.inf
    return bool


FAULTS = {
    f.__name__: f
    for f in (
        loss_is_nan_on_rank_1,
        one_gradient_element_is_inf_on_rank_1,
        one_gradient_element_is_inf_on_rank_1_after_the_reduction,
        an_embedding_weight_is_inf_on_one_rank,
        loss_times_100,
    )
}
