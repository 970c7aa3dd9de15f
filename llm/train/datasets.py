"""The configured datasets as open shards, the same on every rank and made with the run's tokenizer."""

import json
from collections import Counter
from pathlib import Path

from llm.config import ConfigError, RunConfig
from llm.data.grown_ids import settle
from llm.data.import_ids import import_ids
from llm.data.ledger import Ledger
from llm.data.manifest import check_compatible, find_shards
from llm.data.shards import Shard
from llm.dist import World
from llm.log import log
from llm.tokenizer import Tokenizer, tokenizer_info


def open_shards(cfg: RunConfig, tokenizer: Tokenizer, world: World) -> tuple[dict[str, list[Shard]], list[Shard]]:
    """Training shards by dataset name, and all validation shards. Collective. Raises UserError on every rank."""
    paths = world.on_rank_0(lambda: {name: _shard_path(cfg, path, tokenizer) for name, path in cfg.data.datasets.items()})

    def open_all() -> tuple[dict[str, list[Shard]], list[Shard]]:
        train = {name: find_shards([path], "train") for name, path in paths.items()}
        val = find_shards(list(paths.values()), "val")
        check_compatible([s for found in train.values() for s in found] + val, tokenizer.fingerprint, cfg.model.seq_len, cfg.data.rechunk)
        return train, val

    train, val = world.together(open_all)
    by_role = [{name: _ids(found) for name, found in train.items()}, _ids(val)]
    world.refuse_differences("data.data_path", json.dumps(by_role, sort_keys=True))
    return train, val


def _ids(shards: list[Shard]) -> list[str]:
    return sorted(shard.meta.shard_id for shard in shards)


def settle_imports(
    datasets: dict[str, list[Shard]], ledger: Ledger, world: World
) -> tuple[dict[str, list[Shard]], list[str]]:
    """`datasets` with what the ledger knows of each .jsonl of ids and what was added to it apart.

    Also why files that were changed otherwise may not be trained on. Collective. Raises UserError.
    """

    def settled() -> tuple[dict[str, list[str]], list[str]]:
        found = settle(pool(datasets), ledger)
        for why in found.refused:
            log.warning(why)
        paths = {whole: [str(s.meta.path) for s in shards] for whole, shards in found.shards.items()}
        return paths, found.refused

    def opened(shards: list[Shard]) -> list[Shard]:
        places = [paths.get(s.meta.shard_id, [str(s.meta.path)]) for s in shards]
        return pool({"": [Shard.open(path) for some in places for path in some]})

    paths, refused = world.on_rank_0(settled)
    if not paths:
        return datasets, []
    found = world.together(lambda: {name: opened(shards) for name, shards in datasets.items()})
    return found, refused


def pool(datasets: dict[str, list[Shard]]) -> list[Shard]:
    """All shards, those that several datasets hold once."""
    return list({s.meta.shard_id: s for found in datasets.values() for s in found}.values())


class DatasetTokens:
    """Counts the tokens that a run's draws took from each of its datasets."""

    def __init__(self, datasets: dict[str, list[Shard]]):
        # a shard that several hold is the first one's, as in `phases`
        self._names = {s.meta.shard_id: name for name, found in reversed(datasets.items()) for s in found}
        self._drawn = {}  # phase name -> (draws counted so far, how many of them each shard gave)

    def of(self, ledger: Ledger) -> dict[str, int]:
        """Since step 0, as of `ledger`. A draw counts as an even part of its shard's tokens but the first, so whole passes count each once."""
        tokens = Counter()
        for phase in ledger.phases:
            counted, draws = self._drawn.get(phase.name, (0, 0))
            draws = draws + phase.draw_counts(counted, phase.consumed)
            self._drawn[phase.name] = phase.consumed, draws
            for shard, n in zip(phase.shards, draws.tolist(), strict=True):
                tokens[self._names.get(shard.shard_id, "not_configured")] += n * (shard.n_tokens - 1) / max(1, shard.n_samples)
        return {name: round(n) for name, n in tokens.items()}


def _shard_path(cfg: RunConfig, path: str, tokenizer: Tokenizer) -> str:
    """Where the shards of a configured path are: a .jsonl of ids becomes a shard first. Rank 0 only."""
    if not path.endswith(".jsonl"):
        return path
    if not Path(path).is_file():
        raise ConfigError(f"data.data_path: {path} does not exist.")
    name = f"{Path(path).stem}.imported"
    folder = Path(path).with_name(name) if cfg.data.save_bin else cfg.run_folder / name
    meta = import_ids(path, folder, tokenizer_info(tokenizer), cfg.model.seq_len)
    log.info(f"{path}: {meta.n_docs:,} lists of ids, {meta.n_tokens:,} tokens, as shard {meta.path}")
    return str(meta.path)
