"""Raw text to a dataset folder of shards, by several processes, resumable and the same for any number of them.

Units of text are encoded into parts under OUT/.work; when all are there, shards are made of them, and the manifest comes last.
Whatever is killed at whatever moment, the same command again continues and ends with the same shards.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import llm
from llm.corpus.assemble import ShardWriter, distinct_units, emit_jsonl, identify
from llm.corpus.documents import Counts
from llm.corpus.encode import FAST, REFERENCE, Job, Request, check_template
from llm.corpus.formats import shape_of, tell_formats
from llm.corpus.parts import ROLES, PartUnit, read_part
from llm.corpus.plan import Source, find_sources, plan_tasks, plan_units, unpacked
from llm.corpus.pool import encode_all
from llm.corpus.shapes import TEXT_SHAPES
from llm.corpus.tokenizer_use import note_use
from llm.data.manifest import FILE_NAME, Manifest, load_manifest, write_manifest
from llm.data.record import write_record
from llm.data.shard_meta import ShardMeta, token_dtype
from llm.log import UserError, log
from llm.tokenizer import Tokenizer, load_tokenizer, tokenizer_info
from llm.tokenizer.fast import no_fast_encoder

MAX_MALFORMED = 0.001
WORK = ".work"


class Unusable(UserError):
    """The text is such that no dataset can be made of it."""


@dataclass(frozen=True)
class Report:
    """What a run has added to a dataset, and how fast it encoded."""

    shards: list[ShardMeta]
    counts: Counts
    """Of all inputs, also those that the dataset held already."""
    encoded_bytes: int
    seconds: float


def tokenize_corpus(request: Request) -> Report:
    """Tokenize those inputs that `request.out` does not hold yet into new shards. Raises UserError, and then publishes nothing."""
    sources = find_sources(request.inputs, request.options)
    tell_formats([source.path for source in sources], request.options)
    tokenizer = load_tokenizer(request.tokenizer_path, request.tokenizer_kind)
    info, template = tokenizer_info(tokenizer), _template(sources, request, tokenizer)
    _existing(request, info, template)  # refuses before anything is written
    with _work_folder(request.out) as work:
        manifest = _existing(request, info, template)  # again, now that nobody else can change it
        known = frozenset(unit_id for source in manifest.sources for unit_id in source["unit_ids"]) if manifest else frozenset()
        job = Job(work, request, token_dtype(info["vocab_size"]), known)
        timestamp = _timestamp(work, manifest)
        sources = unpacked(sources, work, request.options)
        units, unit_bytes = plan_units(sources, request.options, manifest)
        tasks = plan_tasks(units, _settings(request, info, manifest))
        encoded_bytes, seconds = encode_all(tasks, job, request.workers, _encoder(request, tokenizer))

        part_units = [unit for task in tasks for unit in read_part(work, task)]
        counts = _checked_counts(part_units)
        read_sources = identify(part_units)
        if not read_sources:
            raise Unusable("there is no text: the inputs hold no document that is not empty. Give files with text.")
        distinct = distinct_units(read_sources, {source["source_id"] for source in manifest.sources} if manifest else set())
        _check_amount(distinct, manifest)

        note_use(Path(request.tokenizer_path), request.out)
        writer = {"program": f"tally-llm {llm.__version__}", "val_ratio": request.val_ratio, "shuffle_seed": request.shuffle_seed}
        shards = ShardWriter(request, info, timestamp, writer | ({"template": template} if template else {})).publish(distinct)
        entries = [source.to_json(unit_bytes[source.source.path]) for source in read_sources]
        write_manifest(request.out, sources=entries, shards=shards, tokenizer=info, seq_len=request.seq_len, template=template)
        if request.emit_jsonl:
            emit_jsonl(request.out)
        shutil.rmtree(work)
    return Report(shards, counts, encoded_bytes, seconds)


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """The folder for parts inside `out`, held by a lock: two runs at once would trip over each other."""
    work, is_new = out / WORK, not out.exists()
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115  held until the end
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}). Choose another --out, or make it writable.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out}: another run is tokenizing into this folder. Wait for it, or choose another --out.") from None
        try:
            yield work
        except OSError as error:
            where = error.filename or out
            raise UserError(f"{where}: {error.strerror}. Put that right and run again: finished parts are kept.") from error
        except Unusable:
            shutil.rmtree(out if is_new else work)  # the text must change first, so nothing of this is worth keeping
            raise


def _template(sources: list[Source], request: Request, tokenizer: Tokenizer) -> dict | None:
    """The chat template if there are conversations among the sources. Raises UserError when it does not fit the tokenizer."""
    if all(shape_of(source.path, request.options) in TEXT_SHAPES for source in sources):
        return None
    check_template(request.options.template, tokenizer)
    return request.options.template.to_json()


def _existing(request: Request, info: dict, template: dict | None) -> Manifest | None:
    """The manifest that is there, if any; refuses to mix tokenizers, lengths or templates."""
    out = request.out
    if not (out / FILE_NAME).exists():
        return None
    manifest = load_manifest(out)
    theirs, ours = manifest.tokenizer["fingerprint"][:16], info["fingerprint"][:16]
    if theirs != ours:
        raise UserError(
            f"{out}: was made with tokenizer {theirs}, and {request.tokenizer_path} is {ours}. A dataset holds ids of one "
            f"tokenizer: give the first one, or another --out."
        )
    if manifest.seq_len != request.seq_len:
        raise UserError(
            f"{out}: was made for seq_len {manifest.seq_len}, not {request.seq_len}. Give --seq-len {manifest.seq_len}, or another --out."
        )
    if template and not manifest.takes(template):
        theirs, ours = (f"{t['name']} ({t['turn']!r})" for t in (manifest.template, template))
        raise UserError(
            f"{out}: its conversations were written with the template {theirs}, these would be with {ours}, and a model would meet two forms "
            f"of one thing. Give the first one with --template (ChatML: leave it out), or another --out."
        )
    return manifest


def _encoder(request: Request, tokenizer: Tokenizer) -> str:
    """FAST if that is wanted and can be had here."""
    if request.encoder == REFERENCE:
        return REFERENCE
    if why_not := no_fast_encoder(tokenizer):
        log.info(f"encoding with the reference encoder: {why_not}")
        return REFERENCE
    return FAST


def _settings(request: Request, info: dict, manifest: Manifest | None) -> dict:
    """All that decides what a part holds, beside the file it comes from."""
    return {
        "tokenizer": info["fingerprint"],
        "options": asdict(request.options),
        "val_ratio": request.val_ratio,
        "shuffle_seed": request.shuffle_seed,
        "known_units": manifest.manifest_id if manifest else None,
    }


def _timestamp(work: Path, manifest: Manifest | None) -> str:
    """This run's, or that of the interrupted run that it continues; never one that published shards bear."""
    path, names = work / "job.json", [shard["path"] for shard in manifest.shards] if manifest else []
    seconds = json.loads(path.read_bytes())["started_at"] if path.exists() else int(time.time())
    while any(f".{_stamp(seconds)}-" in name for name in names):
        seconds += 1
    write_record(path, {"started_at": seconds})
    return _stamp(seconds)


def _stamp(seconds: int) -> str:
    return time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))


def _checked_counts(part_units: list[PartUnit]) -> Counts:
    """The sum of what reading has met. Refuses a source of which too much cannot be read."""
    total, by_source = Counts(), {}
    for part_unit in part_units:
        counts = Counts(**part_unit.record["counts"])
        by_source.setdefault(part_unit.unit.source, Counts()).add(counts)
        total.add(counts)
    for example in total.examples:
        log.warning(f"malformed: {example}")
    for source, counts in by_source.items():
        if counts.malformed > MAX_MALFORMED * counts.records:
            raise Unusable(
                f"{source.given}: {counts.malformed:,} of {counts.records:,} records are malformed, and more than {MAX_MALFORMED:.1%} is too "
                f"many to go on. The first: {counts.examples[0]}. Repair the file, or leave it out."
            )
    return total


def _check_amount(units: list[PartUnit], manifest: Manifest | None) -> None:
    n_docs = {role: sum(unit.record[role]["docs"] for unit in units) for role in ROLES}
    if not manifest and not n_docs["train"]:
        raise Unusable(
            f"documents: {n_docs['val']}, and all fell into the validation split, so nothing is left to train on. Give more documents, "
            f"divide the file into documents with --separator, or choose another --val-ratio."
        )
