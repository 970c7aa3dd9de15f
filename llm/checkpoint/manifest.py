"""MANIFEST.json, the commit record of a checkpoint: what it holds, what it came from, and the hash of every file."""

import hashlib
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from llm.checkpoint.slices import KINDS, CheckpointError, coverage_gaps

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
    config: dict[str, Any]
    tokenizer_fingerprint: str
    ledger: dict[str, Any]
    chain: str
    """Digest chain over the data that was really fed (llm.data.stream.chain)."""
    engine: dict[str, Any]
    versions: dict[str, str]
    metrics: dict[str, float | None]
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
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not hang, nor a link lead elsewhere
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("is not a plain file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"is larger than {most:,} bytes")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    keys = [key for key, _ in pairs]
    if len(keys) != len(set(keys)):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"holds {name}, which is no JSON")


def read_manifest(folder: Path) -> Manifest:
    """Parse and check a checkpoint's manifest. Raises CheckpointError that names the file."""
    path = folder / NAME
    try:
        fields = json.loads(read_small(path, MAX_BYTES).decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        manifest = Manifest.model_validate(fields)
        fields.pop("self_sha256")
        if manifest.self_sha256 != _seal(fields):
            raise ValueError("its content does not match its own hash")
    except (OSError, ValueError, ValidationError, RecursionError) as error:
        reason = str(error).splitlines()[0] if not isinstance(error, OSError) else error.strerror
        raise CheckpointError(f"{path}: not a sound checkpoint manifest ({reason}).") from None
    return manifest
