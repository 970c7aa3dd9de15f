"""What holds of every checkpoint that this program has written: name, run, numbers that fit.

Hashes show only that files and manifest are those that were sealed together. A folder may still be
copied, renamed or laid among another run's, and a manifest edited and sealed again. Each rule looks
at a checkpoint's path and manifest and returns what contradicts, with both values, or None. What a
ledger or an engine's state means is not known here: llm/train/invariants.py adds rules for them.
"""

import re
from collections import Counter
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
    if not COMMITTED.fullmatch(path.name):  # a copy that a person has called something else
        return None
    named = folder.step_name if manifest.is_whole else folder.weights_name
    own = named(manifest.step, manifest.attempt)
    if path.name == own:
        return None
    return f"the folder is called {path.name}, but its manifest is that of {own}"


def _run(path: Path, manifest: Manifest) -> str | None:
    if not COMMITTED.fullmatch(path.name):
        return None
    for where, run_id in folder.run_ids(path.parent, path).items():
        if run_id != manifest.run_id:
            mine = manifest.run_id
            return f"it is of the run {mine}, but the folder's {where} is of the run {run_id}"
    return None


def _files(path: Path, manifest: Manifest) -> str | None:
    for name, n in Counter(file.path for file in manifest.files).items():
        if n > 1:
            return f"{name} is listed {n} times"
    return next(iter(manifest.gaps), None)


def _state_hash(path: Path, manifest: Manifest) -> str | None:
    if -(2**63) <= manifest.state_hash < 2**63:
        return None
    return f"state_hash {manifest.state_hash} does not fit into 64 bits"


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
    """A thinned one's is the whole one of its step; a fork's is of another run and its attempts."""
    if manifest.parent is None:
        return None
    if not COMMITTED.fullmatch(manifest.parent.name):
        return f"its parent is called {manifest.parent.name!r}, which is no name of a checkpoint"
    _, step = parse_name(manifest.parent.name)
    if step <= manifest.step:
        return None
    return f"it is of step {manifest.step:,}, but its parent {manifest.parent.name} of a later one"


def _lineage(path: Path, manifest: Manifest) -> str | None:
    """Each attempt goes on from a checkpoint of an earlier one."""
    history = [*map(parse_name, manifest.lineage), (manifest.attempt, manifest.step)]
    for before, after in pairwise(history):
        if not (before[0] < after[0] and before[1] <= after[1]):
            return (
                f"attempt {after[0]} at step {after[1]:,} cannot have gone on from "
                f"attempt {before[0]} at step {before[1]:,}"
            )
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
    else:
        return None
    where = ".".join(map(str, ("config", "model", *first["loc"])))
    return f"{where}: {first['msg']} ({both_versions(manifest)})"


def both_versions(manifest: Manifest) -> str:
    theirs = manifest.versions.get("tally", "unknown")
    return f"written by Tally {theirs}, this is Tally {llm.__version__}"


INVARIANTS: dict[str, Rule] = {
    "name": _name,
    "run": _run,
    "files": _files,
    "state hash": _state_hash,
    "digests": _digests,
    "parent": _parent,
    "lineage": _lineage,
    "batch": _batch,
    "model": _model,
}


def contradictions(
    path: Path, manifest: Manifest, rules: Mapping[str, Rule] = INVARIANTS
) -> list[str]:
    """What does not fit together, in words that name the manifest. Raises Unreadable."""
    found = [rule(path.absolute(), manifest) for rule in rules.values()]
    return [f"{path / NAME}: {problem}" for problem in found if problem]


def check_invariants(
    path: Path, manifest: Manifest, rules: Mapping[str, Rule] = INVARIANTS
) -> None:
    """Raises Unjudged that lists all contradictions, for a person to clear up."""
    if found := contradictions(path, manifest, rules):
        raise Unjudged(
            f"{'; '.join(found)}. The manifest fits its own hash, so this is no damage: the folder "
            f"was renamed or copied here from elsewhere, the manifest edited, or a newer version "
            f"wrote it. Nothing was moved. Give the folder back its name, or move it out of "
            f"{path.absolute().parent} yourself, then run again."
        )
