"""What a sitting begins with: the position, weights, moments and generators of a checkpoint, or another run's weights, each checked."""

from torch import nn

from llm.checkpoint.resume import Checkpoint, open_checkpoint
from llm.checkpoint.rng import load_rng_state
from llm.checkpoint.slices import CheckpointError, state_hash
from llm.config import ConfigError, RunConfig
from llm.data.ledger import Ledger
from llm.dist import World
from llm.engine import Engine, build_engine
from llm.log import log
from llm.model.init import build_model
from llm.tokenizer import Tokenizer
from llm.train.drift import check_drift
from llm.train.loop import Progress


def check_identity(checkpoint: Checkpoint, cfg: RunConfig, tokenizer: Tokenizer, init_from: str | None, accepted: list[str]) -> None:
    """Refuse to go on with another tokenizer, another model or settings that nobody has accepted."""
    saved = checkpoint.manifest.tokenizer_fingerprint
    if saved != tokenizer.fingerprint:
        raise CheckpointError(
            f"{cfg.tokenizer.tokenizer_path}: this is another tokenizer than the run's: fingerprint {tokenizer.fingerprint[:16]}, the run "
            f"was trained with {saved[:16]}. That one lies in {checkpoint.folder / 'tokenizer'}; point tokenizer.tokenizer_path there, "
            f"or start another run with checkpoint.run_name=NAME."
        )
    if init_from:
        raise ConfigError(
            f"--init-from starts a new run, but {cfg.run_folder} has a checkpoint of step {checkpoint.manifest.step:,}. "
            f"Choose another checkpoint.run_name, or leave --init-from out to go on."
        )
    check_drift(checkpoint.manifest.config, cfg, accepted)


def position(checkpoint: Checkpoint | None) -> Progress:
    """Where a checkpoint stands; the very beginning without one."""
    if checkpoint is None:
        return Progress(step=0, tokens_seen=0, ledger=Ledger(()), chain="")
    manifest = checkpoint.manifest
    return Progress(
        manifest.step,
        manifest.tokens_seen,
        Ledger.from_json(manifest.ledger),
        manifest.chain,
        manifest.engine["optimizer_step"],
        dict(manifest.metrics),
        recent={key: list(values) for key, values in manifest.recent.items()},
    )


def build_loaded_engine(cfg: RunConfig, world: World, checkpoint: Checkpoint | None, source: Checkpoint | None) -> Engine:
    """Model and engine with the checkpoint's state in them, verified by its state hash."""
    model = build_model(cfg.model, cfg.train.seed)
    if source:
        world.together(lambda: _copy_weights(source, model))
    engine = world.together(lambda: build_engine(cfg, world, model))
    if checkpoint is None:
        return engine
    engine.load_slices(checkpoint.reader)
    engine.load_state(checkpoint.manifest.engine)
    (loaded,) = world.sum_ints([state_hash(engine.local_slices())])
    if loaded != checkpoint.manifest.state_hash:
        raise CheckpointError(
            f"{checkpoint.folder}: the state that was loaded has hash {loaded}, the checkpoint was saved with {checkpoint.manifest.state_hash}. "
            f"Its files are sound, so this is a fault of the program or of this machine's memory; nothing was changed."
        )
    rng = checkpoint.folder / f"rank-{world.rank:05d}-of-{world.size:05d}.json"
    world.together(lambda: load_rng_state(rng) if rng.exists() else None)
    return engine


def open_source(init_from: str | None, tokenizer: Tokenizer) -> Checkpoint | None:
    """The checkpoint that --init-from names."""
    if init_from is None:
        return None
    source = open_checkpoint(init_from)
    theirs = source.manifest.tokenizer_fingerprint
    if theirs != tokenizer.fingerprint:
        raise CheckpointError(
            f"{source.folder}: was trained with tokenizer {theirs[:16]}, this run uses {tokenizer.fingerprint[:16]}, and its weights mean "
            f"nothing for other ids. Set tokenizer.tokenizer_path={source.folder / 'tokenizer'}."
        )
    return source


def _copy_weights(source: Checkpoint, model: nn.Module) -> None:
    """Weights alone: a new run has its own moments and ledger."""
    here, there = {name: tuple(p.shape) for name, p in model.named_parameters()}, dict(source.manifest.shapes)
    if here != there:
        odd = [f"{n}: {there.get(n)} there, {here.get(n)} here" for n in sorted({*here, *there}) if there.get(n) != here.get(n)]
        raise CheckpointError(f"{source.folder}: its model has other dimensions ({'; '.join(odd[:3])}). Use the same model section.")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(source.reader.read_full(name))
    log.info(f"weights from {source.folder}")
