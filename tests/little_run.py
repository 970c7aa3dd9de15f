"""A run small enough for tests: token i of the corpus has id i, so what was fed says by its value where it came from."""

import json
import os
import signal
import time
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import tokenizers
from ranks import exit_codes, run_ranks

from llm.checkpoint import folder
from llm.checkpoint.manifest import Manifest, read_manifest
from llm.config import load_config
from llm.data.ledger import Ledger
from llm.data.manifest import write_manifest
from llm.data.shards import token_dtype, write_shard
from llm.dist import World
from llm.log import UserError
from llm.tokenizer import SPECIAL_TOKENS, load_tokenizer, tokenizer_info

WORDS = 2000
SEQ_LEN = 8


def make_tokenizer(path: Path, words: int = WORDS) -> Path:
    """One token a word, w0 to w1999, then the special tokens."""
    vocabulary = {f"w{i}": i for i in range(words)} | {name: words + i for i, name in enumerate(SPECIAL_TOKENS)}
    hf = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    hf.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    path.mkdir(parents=True)
    hf.save(str(path / "tokenizer.json"))
    return path


def add_shard(
    data: Path, tokenizer: Path, first: int, last: int, role: str = "train", seq_len: int = SEQ_LEN, lengths: list[int] | None = None,
    mask_spans: np.ndarray | None = None, template: dict | None = None,
) -> Path:  # fmt: skip
    """A shard in the dataset folder `data` with the ids first..last-1, one document or documents of these lengths."""
    info = tokenizer_info(load_tokenizer(tokenizer))
    unit = {"unit_id": f"unit-{first}-{last}", "bytes": 5 * (last - first)}
    parts = [(np.arange(first, last), np.array(lengths or [last - first]))]
    meta = write_shard(
        data, f"{role}-{first:05d}", parts, dtype=token_dtype(info["vocab_size"]), tokenizer=info, units=[unit], role=role, seq_len=seq_len,
        writer={"version": "test"} | ({"template": template} if template else {}), mask_spans=mask_spans,
    )  # fmt: skip
    source = {"source_id": unit["unit_id"], "names": ["text"], "docs": 1, "bytes": 1, "unit_bytes": 1, "unit_ids": [unit["unit_id"]]}
    write_manifest(data, sources=[source], shards=[meta], tokenizer=info, seq_len=seq_len)
    return meta.path


def make_run(root: Path, **changes) -> Path:
    """Tokenizer, two training shards of 150 and 141 ids, a validation shard, and a config; returns the config's path.

    37 samples of up to 8 targets, 36 of them whole; a batch of 4 makes 10 steps, the last with one row.
    """
    tokenizer = make_tokenizer(root / "tokenizer")
    add_shard(root / "data", tokenizer, 0, 150)
    add_shard(root / "data", tokenizer, 200, 341)
    add_shard(root / "data", tokenizer, 400, 450, role="val")
    cfg = {
        "n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "seq_len": SEQ_LEN,
        "tokenizer_path": str(tokenizer), "data_path": str(root / "data"), "checkpoint_dir": str(root / "checkpoints"),
        "lr": 1e-2, "batch_size": 1, "batch_tokens": 4 * SEQ_LEN, "warmup_steps": 2, "eval_every": 5, "save_every": 0, "keep_last": 9,
        "precision": "fp32", "log_every": 1, "tensorboard": False, "device": "cpu",
    }  # fmt: skip
    path = root / "little.json"
    path.write_text(json.dumps(cfg | changes))
    return path


def targets_of_the_corpus(*ranges: tuple[int, int]) -> Counter:
    """Every id of these shards but each one's first, once."""
    return Counter(i for first, last in ranges for i in range(first + 1, last))


CORPUS = targets_of_the_corpus((0, 150), (200, 341))  # of make_run


def sit(world: World, config: str, overrides: list[str] = (), fed: str | None = None, **options) -> dict:
    """One sitting of training in this process. Notes in the folder `fed` which targets each step was fed, as the engine got them.

    Records of steps that a kill undid are dropped, as the checkpoint's own history drops them.
    """
    from llm.eval.in_training import read_tasks
    from llm.train import run as training
    from llm.train.phases import Wish

    cfg = load_config(config, list(overrides))
    wish = Wish(**{key: options.pop(key) for key in ("only_new", "reset_epoch", "dataset", "replay") if key in options})
    if fed:
        listen(world, Path(fed), cfg.run_folder)

    def tasks(cfg, world):
        return read_tasks(cfg.eval, world).measure if cfg.eval.tasks else None

    training.train(cfg, world, training.Options(started_at=time.monotonic(), wish=wish, **options), tasks)
    entries = folder.entries(cfg.run_folder)
    manifest = read_manifest(entries[-1].path) if entries else None
    return {"step": manifest.step, "state": manifest.state_hash, "chain": manifest.chain, "ledger": manifest.ledger} if manifest else {}


def listen(world: World, fed: Path, run: Path) -> None:
    """From now on each step notes in `fed` what the engine gets. Collective."""
    _forget_undone(world, fed, run)
    _record_what_is_fed(world, fed, run)


def _forget_undone(world: World, fed: Path, run: Path) -> None:
    fed.mkdir(exist_ok=True)
    done = max((e.step for e in folder.entries(run)), default=0)
    if world.rank == 0:
        for path in fed.iterdir():
            if int(path.name.split("-")[1]) >= done:
                path.unlink(missing_ok=True)
    world.barrier()


def _record_what_is_fed(world: World, fed: Path, run: Path) -> None:
    from llm.train import start as starting

    build = starting.build_engine

    def build_and_listen(*args):
        engine = build(*args)
        train_step, start = engine.train_step, max((e.step for e in folder.entries(run)), default=0)
        steps = count(start)

        def listening(batches, *rest):
            targets = [int(t) for batch in batches for t in batch.targets_BT.flatten() if t != -100]
            (fed / f"step-{next(steps)}-rank-{world.rank}").write_text(json.dumps(targets))
            return train_step(batches, *rest)

        engine.train_step = listening
        return engine

    starting.build_engine = build_and_listen


def fed_targets(fed: Path) -> Counter:
    """How often each id was a target in all steps."""
    return Counter(t for path in Path(fed).iterdir() for t in json.loads(path.read_text()))


def fed_by_step(fed: Path) -> dict[int, list[int]]:
    """The targets of each step, sorted, whichever rank got them."""
    steps: dict[int, list[int]] = {}
    for path in Path(fed).iterdir():
        steps.setdefault(int(path.name.split("-")[1]), []).extend(json.loads(path.read_text()))
    return {step: sorted(targets) for step, targets in sorted(steps.items())}


def sit_alone(tmp_path: Path, config: Path, *args, **kwargs) -> dict:
    """One sitting in a process of its own, so that its redirected output and threads stay there."""
    (result,) = run_ranks(sit_with, 1, tmp_path, str(config), *args, kwargs)
    return result


def sit_with(world: World, config: str, *args) -> dict:
    *positional, options = args
    return sit(world, config, *positional, **options)


def newest_manifest(config: Path) -> Manifest:
    return read_manifest(folder.entries(load_config(config).run_folder)[-1].path)


def newest_ledger(config: Path) -> Ledger:
    return Ledger.from_json(newest_manifest(config).ledger)


def losses(config: Path) -> dict[int, float]:
    """Training loss by step, the last record of each step."""
    path = load_config(config).log_folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def message_of(world: World, config: str, overrides: list[str]) -> str:
    """The user's mistake that a sitting ends with, or `went on`."""
    try:
        sit(world, config, overrides)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "went on"


def run_and_kill(tmp_path: Path, config: Path, fed: Path, after: int, save: str = "async_save=true") -> int:
    """A sitting whose process kills itself once `after` updates are applied; its exit code."""
    (code,) = exit_codes(sit_until_killed, 1, tmp_path, str(config), str(fed), after, save)
    return code


def sit_until_killed(world: World, config: str, fed: str, after: int, save: str) -> None:
    from llm.train import loop

    applied, chain = count(1), loop.chain

    def count_and_die(*args):
        if next(applied) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return chain(*args)

    loop.chain = count_and_die
    sit(world, config, ["save_every=2", save], fed, retry_anyway=True)
