"""What a model was trained on before its run, through fine-tunes, forks, exports and imports.

Each checkpoint holds the ledgers of its bases, so their folders may be gone. An exported folder has
them in a file beside the weights, with the weights' hashes: weights that were changed since have a
history that nobody knows.
"""

from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from llm.checkpoint.hashes import file_sha256
from llm.checkpoint.manifest import NAME, Base
from llm.checkpoint.resume import Checkpoint
from llm.log import log

from .at_hand import configured_paths
from .ledger import Ledger
from .record import read_record, write_record
from .seen import seen_view, view_lines

FILE, FORMAT, VERSION = "tally_lineage.json", "tally-lineage", 1


@dataclass(frozen=True)
class Ancestor:
    """A run that has trained the model: a base, or the one asked about."""

    name: str
    ledger: Ledger
    data: list[str]
    """Where its shards were."""


@dataclass(frozen=True)
class History:
    """Which runs have trained a model, and what nobody knows."""

    bases: tuple[Base, ...]
    """As the checkpoint has them, oldest first."""
    runs: tuple[Ancestor, ...]
    """Those whose ledgers are known, oldest first; the last is the run itself."""

    @property
    def unknown(self) -> list[str]:
        """Where the ledgers begin too late, in words."""
        return [
            _UNKNOWN[base.kind].format(base.run) for base in self.bases if base.kind in _UNKNOWN
        ]

    def lines(self, with_phases: bool = True) -> list[str]:
        """The bases for people, oldest first; before what the run itself was trained on."""
        lines = []
        for base in self.bases:
            if base.kind in _UNKNOWN:
                lines.append(f"unknown: {_UNKNOWN[base.kind].format(base.run)}")
                continue
            lines.append(
                f"{_BEGAN[base.kind]} {base.run} at step {base.step:,}, "
                f"{base.tokens_seen:,} tokens, manifest {base.manifest_sha256[:16]}"
            )
            if base.ledger is not None and with_phases:
                phases = "\n".join(view_lines(seen_view(Ledger.from_json(base.ledger))))
                lines += indent(phases.strip("\n"), "  ").splitlines()
        return lines


_BEGAN = {"weights": "began with the weights of", "forked": "forked (--anneal) from"}
_UNKNOWN = {
    "imported": "what {} was trained on before it was imported is unknown",
    "unrecorded": "{} was begun by a version that noted no bases, so it may have one",
}


def history_of(checkpoint: Checkpoint) -> History:
    manifest, name = checkpoint.manifest, _run_name(checkpoint)
    bases = tuple(_recorded_bases(checkpoint))
    runs = [
        Ancestor(b.run, Ledger.from_json(b.ledger), b.data) for b in bases if b.ledger is not None
    ]
    itself = Ancestor(name, Ledger.from_json(manifest.ledger), configured_paths(manifest.config))
    return History(bases, (*runs, itself))


def bases_of_run(
    parent: Checkpoint | None, is_fork: bool, source: Checkpoint | None
) -> list[Base] | None:
    """What a run notes in its checkpoints: it goes on from `parent`, or has weights of `source`."""
    if source:
        return descended(source)
    if parent and is_fork:
        return [*_recorded_bases(parent), _base(parent, "forked")]
    return parent.manifest.bases if parent else []


def descended(checkpoint: Checkpoint) -> list[Base]:
    """The bases of a model that begins with this checkpoint's weights."""
    return [*_recorded_bases(checkpoint), _base(checkpoint, "weights")]


def _recorded_bases(checkpoint: Checkpoint) -> list[Base]:
    noted = checkpoint.manifest.bases
    return [Base(kind="unrecorded", run=_run_name(checkpoint))] if noted is None else noted


def _base(checkpoint: Checkpoint, kind: str) -> Base:
    manifest = checkpoint.manifest
    ledger = manifest.ledger if kind == "weights" else None
    return Base(
        kind=kind,
        run=_run_name(checkpoint),
        step=manifest.step,
        tokens_seen=manifest.tokens_seen,
        manifest_sha256=file_sha256(checkpoint.folder / NAME),
        ledger=ledger,
        data=configured_paths(manifest.config),
    )


def _run_name(checkpoint: Checkpoint) -> str:
    """As its config has it; of an import, which has none, the folder's."""
    config: dict = checkpoint.manifest.config
    return config.get("checkpoint", {}).get("run_name") or checkpoint.folder.absolute().parent.name


def write_lineage(folder: Path, checkpoint: Checkpoint) -> None:
    """Note in an exported folder where its weights come from; not where the data lay."""
    bases = [base.model_dump(mode="json") | {"data": []} for base in descended(checkpoint)]
    fields = {"bases": bases, "files": _weight_hashes(folder)}
    write_record(folder / FILE, {"format": FORMAT, "version": VERSION, **fields})


def read_lineage(folder: Path) -> list[Base]:
    """The bases of the weights in a folder, which need not be an export of ours.

    Raises ShardError for a damaged record.
    """
    unknown = Base(kind="imported", run=folder.absolute().name)
    if not (folder / FILE).exists():
        return [unknown]
    remedy = "Copy it again; without it the weights are imported as of unknown history."
    record = read_record(folder / FILE, FORMAT, VERSION, remedy)
    bases = [Base.model_validate(base) for base in record["bases"]]
    if _weight_hashes(folder) == record["files"]:
        return bases
    log.warning(
        f"{folder}: its weights are not those that were exported: "
        f"what was done to them since is unknown"
    )
    return [*bases, unknown]


def _weight_hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}
