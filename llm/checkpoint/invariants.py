"""What holds of every checkpoint that this program has written, whatever its hashes say: its name, its run, and numbers that fit together.

A seal shows only that nobody changed a manifest without sealing it again, and a folder may be copied, renamed or laid among
another run's. Each rule looks at a checkpoint's path and manifest and returns what contradicts, with both values, or None.
What a ledger or an engine means is not known here: those who know add their own rules (llm/train/invariants.py).
"""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

from pydantic import ValidationError

import llm
from llm.checkpoint import folder
from llm.checkpoint.errors import Unjudged
from llm.checkpoint.folder import COMMITTED, parse_name
from llm.checkpoint.manifest import NAME, Manifest
from llm.config import ModelConfig

Rule = Callable[[Path, Manifest], str | None]


def _name(path: Path, manifest: Manifest) -> str | None:
    match = COMMITTED.fullmatch(path.name)
    if match is None:  # a copy that a person has called something else
        return None
    named = folder.step_name if manifest.is_whole else folder.weights_name
    true_name = named(manifest.step, manifest.attempt)
    if path.name != true_name:
        return f"the folder is called {path.name}, but its manifest is that of {true_name}"
    return None


def _run(path: Path, manifest: Manifest) -> str | None:
    if not COMMITTED.fullmatch(path.name):
        return None
    for where, run_id in folder.run_ids(path.parent, path).items():
        if run_id != manifest.run_id:
            return f"it is of the run {manifest.run_id}, but the folder's {where} is of the run {run_id}"
    return None


def _files(path: Path, manifest: Manifest) -> str | None:
    names = [file.path for file in manifest.files]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    return f"{twice} is listed twice" if twice else next(iter(manifest.gaps), None)


def _state_hash(path: Path, manifest: Manifest) -> str | None:
    return None if -(2**63) <= manifest.state_hash < 2**63 else f"state_hash {manifest.state_hash} does not fit into 64 bits"


def _digests(path: Path, manifest: Manifest) -> str | None:
    digests = [("chain", manifest.chain, "|[0-9a-f]{64}")]  # none before the first step
    if manifest.parent:
        digests.append(("parent.manifest_sha256", manifest.parent.manifest_sha256, "[0-9a-f]{64}"))
    if manifest.probe:
        digests.append(("probe.rows", manifest.probe.rows, "[0-9a-f]+"))
        digests.append(("probe.place", manifest.probe.place, "[0-9a-f]+"))
    for name, digest, pattern in digests:
        if not re.fullmatch(pattern, digest):
            return f"{name} is {digest!r}, which is no such digest"
    return None


def _parent(path: Path, manifest: Manifest) -> str | None:
    """A thinned one's parent is the whole one of its step; a fork's is another run's, with attempts of its own."""
    if manifest.parent is None:
        return None
    if not COMMITTED.fullmatch(manifest.parent.name):
        return f"its parent is called {manifest.parent.name!r}, which is no name of a checkpoint"
    _, step = parse_name(manifest.parent.name)
    return f"it is of step {manifest.step:,}, but its parent {manifest.parent.name} is of a later one" if step > manifest.step else None


def _lineage(path: Path, manifest: Manifest) -> str | None:
    """Each attempt goes on from a checkpoint of an earlier one."""
    history = [*map(parse_name, manifest.lineage), (manifest.attempt, manifest.step)]
    for before, after in pairwise(history):
        if not (before[0] < after[0] and before[1] <= after[1]):
            return f"attempt {after[0]} at step {after[1]:,} cannot have gone on from attempt {before[0]} at step {before[1]:,}"
    return None


def _batch(path: Path, manifest: Manifest) -> str | None:
    rows, ranks = manifest.global_rows, manifest.world_size
    if manifest.is_whole and (not rows or not ranks or rows % ranks):
        return f"global_rows {rows:,} cannot be shared out over world_size {ranks:,} ranks"
    return None


def _model(path: Path, manifest: Manifest) -> str | None:
    """A setting that this version does not know would be left out without a word."""
    if "model" not in manifest.config:
        return None
    try:
        ModelConfig.model_validate(manifest.config["model"])
    except ValidationError as error:
        first = error.errors()[0]
        where, theirs = ".".join(map(str, ("config", "model", *first["loc"]))), manifest.versions.get("tally", "unknown")
        return f"{where}: {first['msg']} (written by Tally {theirs}, this is {llm.__version__})"
    return None


INVARIANTS: dict[str, Rule] = {
    "name": _name, "run": _run, "files": _files, "state hash": _state_hash, "digests": _digests, "parent": _parent, "lineage": _lineage,
    "batch": _batch, "model": _model,
}  # fmt: skip


def contradictions(path: Path, manifest: Manifest, rules: Mapping[str, Rule] = INVARIANTS) -> list[str]:
    """What does not fit together, in words that name the manifest. Raises Unreadable."""
    found = [rule(path.absolute(), manifest) for rule in rules.values()]
    return [f"{path / NAME}: {problem}" for problem in found if problem]


def check_invariants(path: Path, manifest: Manifest, rules: Mapping[str, Rule] = INVARIANTS) -> None:
    """Raises Unjudged that lists all contradictions, for a person to clear up."""
    if found := contradictions(path, manifest, rules):
        raise Unjudged(
            f"{'; '.join(found)}. Its hashes are right, so this is no damage: the folder was renamed, copied here from elsewhere, or "
            f"edited. Nothing was moved. Give it back its name, or move it out of {path.absolute().parent} yourself, then run again."
        )
