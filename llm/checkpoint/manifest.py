"""MANIFEST.json, the commit record of a checkpoint: what it holds, what it came from, and the hash of every file."""

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

import llm
from llm.checkpoint.errors import CheckpointError, Damaged, Unjudged
from llm.checkpoint.plain_files import open_file, open_plain, read_most
from llm.checkpoint.slices import KINDS, coverage_gaps

NAME = "MANIFEST.json"
FORMAT = "tally-checkpoint/1"
WEIGHTS_FORMAT = "tally-weights/1"  # the same without the optimizer's moments
MAX_BYTES = 1 << 28  # a forged one must not fill the memory; an honest one takes some hundred bytes for each parameter and rank


def _plain_path(path: str) -> str:
    """A file's name, or tokenizer/name: nothing that could lead out of the folder."""
    if not re.fullmatch(r"(tokenizer/)?[A-Za-z0-9_-][A-Za-z0-9._-]*", path):
        raise ValueError("is not a plain file name")
    return path


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class Chunk(_Record):
    name: str
    kind: Literal["fp32", "exp_avg", "exp_avg_sq"]
    start: NonNegativeInt
    numel: NonNegativeInt


class File(_Record):
    path: Annotated[str, AfterValidator(_plain_path)]
    bytes: NonNegativeInt
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    chunks: list[Chunk] = []


class Parameter(_Record):
    name: str
    shape: list[NonNegativeInt]


class Parent(_Record):
    name: str
    manifest_sha256: str


class BatchSince(_Record):
    """Where the global batch last changed: each later step took `global_rows` draws, or what its
    phase had left."""

    step: NonNegativeInt
    draws: NonNegativeInt
    """Of all phases together, consumed until then."""


class Base(_Record):
    """What a model was before its run: another run's weights, or something that nobody has noted."""

    kind: Literal["weights", "forked", "imported", "unrecorded"]
    """weights: --init-from, or an export and an import. forked: --anneal, where the ledger goes on.
    imported: from elsewhere. unrecorded: by a version that noted no bases; perhaps there was none."""
    run: str
    step: NonNegativeInt = 0
    tokens_seen: NonNegativeInt = 0
    manifest_sha256: str = ""
    ledger: dict[str, Any] | None = None
    """Of `weights` alone: what that run had been trained on by this step."""
    data: list[str] = []
    """Where that run had its shards."""


class Probed(_Record):
    """The loss of a few fixed rows under these weights, to be computed again after loading."""

    loss: float
    rows: str
    """Digest of the rows' draws, ids and targets."""
    place: str
    """Digest of all that may change the last bits of a loss beside weights and data: ranks, engine, precision, device, torch."""


class Manifest(_Record):
    """Everything but the tensors. `ledger` is llm.data's, `engine` the engine's own scalars, `config` the resolved run config."""

    format: Literal["tally-checkpoint/1", "tally-weights/1"] = FORMAT
    run_id: str
    attempt: NonNegativeInt
    step: NonNegativeInt
    tokens_seen: NonNegativeInt
    parent: Parent | None
    lineage: list[Annotated[str, Field(pattern=r"^step-\d{9}-a\d+$")]] = []
    """The checkpoint that each attempt in its own history went on from, oldest first; names stay true after deletion."""
    bases: list[Base] | None = None
    """Oldest first. None: saved by a version that did not note them."""
    world_size: NonNegativeInt
    global_rows: NonNegativeInt
    batch_since: BatchSince | None = None
    """None: not known, in checkpoints that are older than this field."""
    config: dict[str, Any]
    tokenizer_fingerprint: str
    ledger: dict[str, Any]
    chain: str
    """Digest chain over the data that was really fed (llm.data.stream.chain)."""
    engine: dict[str, Any]
    versions: dict[str, str]
    metrics: dict[str, float | None]
    validated_on: str = ""
    """Digest of what metrics' val_loss was measured on; only losses of one can be compared. Empty
    in older checkpoints."""
    recent: dict[str, list[float]] = {}
    """Losses and gradient norms of the last applied steps, which the spike guard judges by."""
    probe: Probed | None = None
    epoch_end: bool
    params: list[Parameter]
    files: list[File]
    state_hash: int
    self_sha256: str = ""

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(p.name, tuple(p.shape)) for p in self.params]

    @property
    def is_whole(self) -> bool:
        """With the optimizer's moments, so that training can go on from it."""
        return self.format == FORMAT

    @property
    def gaps(self) -> list[str]:
        """What its files do not hold exactly once, in words."""
        kinds = KINDS if self.is_whole else KINDS[:1]
        return coverage_gaps([(name, math.prod(shape)) for name, shape in self.shapes], [f.model_dump() for f in self.files], kinds)

    def text(self) -> str:
        """The JSON to write, sealed with a hash of everything else. Raises CheckpointError if it were too large to be read back."""
        fields = self.model_dump(mode="json", exclude={"self_sha256"})
        text = json.dumps(fields | {"self_sha256": _seal(fields)}, indent=1, allow_nan=False)
        if len(text) > MAX_BYTES:
            raise CheckpointError(
                f"its manifest would have {len(text):,} bytes, and none above {MAX_BYTES:,} is read. The ledger names every unit of text once a "
                f"phase, and every small file is a unit: join small files into larger ones before tokenizing, or use fewer ranks"
            )
        return text


def _seal(fields: dict) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_small(path: Path, most: int) -> bytes:
    """The content of a plain file. Raises ValueError when it is larger than `most` bytes or no plain file, OSError when it cannot be read."""
    handle = open_plain(path)
    try:
        return read_most(handle, most)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> Manifest:
    """Parse and check a checkpoint's manifest.

    Raises Damaged when its own hash, or the lack of one, proves it wrong, Unjudged when it cannot
    be read or is another version's. Both name the file.
    """
    path = folder / NAME
    fields, odd = _parsed(path, _content(folder))
    if fields.get("self_sha256") != _seal({k: v for k, v in fields.items() if k != "self_sha256"}):
        if _is_newer(fields.get("format")):  # which may be sealed by another rule
            raise Unjudged(_of_another_version(path, fields))
        raise Damaged(f"{path}: {_UNSOUND} (its content does not match its own hash)")
    if odd:
        raise Unjudged(f"{path}: is sealed, but {odd[0]}. {_EDITED}")
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        problems = error.errors()
    unknown = [_place(p) for p in problems if p["type"] == "extra_forbidden"]
    if unknown or _is_newer(fields.get("format")):
        raise Unjudged(_of_another_version(path, fields, unknown))
    raise Unjudged(f"{path}: is sealed, but {_place(problems[0])}: {problems[0]['msg']}. {_EDITED}")


_UNSOUND = "not a sound checkpoint manifest"
_EDITED = (
    "No version of this program writes that: it was edited. Nothing was moved; restore the file, "
    "or move the checkpoint away yourself."
)


def _content(folder: Path) -> bytes:
    with open_file(folder, NAME) as handle:
        try:
            return read_most(handle, MAX_BYTES)
        except ValueError as error:
            raise Unjudged(f"{folder / NAME}: {error}. {_EDITED}") from None


def _parsed(path: Path, content: bytes) -> tuple[dict[str, Any], list[str]]:
    """Its JSON object, and what is odd about the text. Raises Damaged when there is none."""
    odd = []

    def unique(pairs: list[tuple[str, Any]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            odd.append("a key is given twice")
        return found

    def constant(name: str) -> float:
        odd.append(f"it holds {name}, which is no JSON")
        return float(name)

    try:
        text = content.decode("utf-8")
        fields = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
        if not isinstance(fields, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path}: {_UNSOUND} ({str(error).splitlines()[0]})") from None
    return fields, odd


def _is_newer(name: Any) -> bool:
    """Whether it is one of our formats with a number that this version does not know."""
    if not isinstance(name, str):
        return False
    found = re.fullmatch(r"tally-(checkpoint|weights)/([1-9]\d{0,5})", name)
    return found is not None and int(found[2]) > 1


def _place(problem: dict) -> str:
    return ".".join(map(str, problem["loc"]))


def _of_another_version(path: Path, fields: dict, unknown: list[str] = ()) -> str:
    versions = fields.get("versions")
    theirs = versions.get("tally", "unknown") if isinstance(versions, dict) else "unknown"
    what = f" and with the field {', '.join(unknown[:3])}" if unknown else ""
    return (
        f"{path}: written by Tally {theirs} as {fields.get('format')}{what}; this is Tally "
        f"{llm.__version__}, which reads {FORMAT} and {WEIGHTS_FORMAT} with the fields it knows. "
        f"Nothing was moved. Go on with the version that wrote it, or a newer one."
    )
