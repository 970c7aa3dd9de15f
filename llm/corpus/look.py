"""What is in a raw file or in token shards, for the eyes of a person: counts, lengths, repeated documents, and windows of the text itself."""

from dataclasses import dataclass, field
from hashlib import sha256
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from llm import durable
from llm.corpus.documents import Counts, Document
from llm.corpus.formats import tell_formats
from llm.corpus.options import ReadOptions
from llm.corpus.plan import find_sources
from llm.corpus.read_all import read_sources
from llm.data.manifest import find_shards, load_manifest
from llm.data.shards import Shard, verify_shard
from llm.log import UserError, progress
from llm.tokenizer import Tokenizer, load_tokenizer

VISIBLE = {"\n": "↵\n", "\t": "⇥", "\r": "␍", "\x00": "␀"}
NO_LOSS = ("‹", "›")  # around what carries no loss


@dataclass
class Look:
    facts: list[str]
    unit: str
    """tokens or characters"""
    lengths: np.ndarray
    """Of each document, in units."""
    repeated: int
    windows: list[str] = field(default_factory=list)
    seq_len: int | None = None


def is_tokenized(path: Path) -> bool:
    return (path / "manifest.json").exists() or path.name.endswith((".bin", ".meta.json"))


# raw text


def look_at_text(path: Path, options: ReadOptions, n_windows: int, chars: int) -> Look:
    """One pass over the documents of a file or folder. The windows show those whose hashes are smallest: any, but always the same."""
    sources, counts, lengths, seen, shown, talks = find_sources([path], options), Counts(), [], set(), [], 0
    tell_formats([source.path for source in sources], options)
    for document in read_sources(sources, options, counts):
        digest = sha256(document.identity()).digest()[:16]
        if digest not in seen:
            shown = sorted([*shown, (digest, document)], key=lambda pair: pair[0])[:n_windows]
        seen.add(digest)
        lengths.append(len(document.text))
        talks += document.conversation is not None
    facts = [
        f"files: {len(sources):,}, {sum(source.size for source in sources):,} bytes",
        f"documents: {len(lengths):,}" + (f", of which conversations: {talks:,}" if talks else ""),
        f"records: {counts.records:,}; empty: {counts.empty:,}, malformed: {counts.malformed:,}, with bytes that are not UTF-8: {counts.bad_utf8:,}",
        *(f"malformed: {example}" for example in counts.examples),
    ]
    windows = [_text_window(document, options, chars) for _, document in shown]
    return Look(facts, "characters", np.array(lengths, np.int64), len(lengths) - len(seen), windows)


def _text_window(document: Document, options: ReadOptions, chars: int) -> str:
    text, left = "", chars
    for carries_loss, run in groupby(document.segments(options.template), lambda s: s.is_assistant or not document.conversation):
        part = "".join(segment.text for segment in run)
        text += _bracketed(_visible(part[:left]), carries_loss)
        left -= len(part)
        if left < 0:
            text += "…"
            break
    return f"── {document.source}, at {document.index:,}, {len(document.text):,} characters\n{text}"


def _bracketed(text: str, carries_loss: bool) -> str:
    return text if carries_loss else f"{NO_LOSS[0]}{text}{NO_LOSS[1]}"


# shards


def look_at_shards(path: Path, tokenizer_path: str | None, n_windows: int, window_tokens: int, seed: int) -> Look:
    """Facts of a dataset folder or a shard; the windows are drawn at random, by `seed`."""
    shards = _shards(path)
    tokenizer = _tokenizer(tokenizer_path, shards)
    lengths, seen, facts = [], set(), []
    with progress(sum(shard.meta.n_docs for shard in shards), "looking for repeated documents", "documents") as bar:
        for shard in shards:
            ends = shard.doc_ends.astype(np.int64)
            starts = np.concatenate([[0], ends[:-1]])
            lengths.append(ends - starts)
            for batch in range(0, len(ends), 4096):  # documents side by side are read at once
                first, last = int(starts[batch]), int(ends[min(batch + 4096, len(ends)) - 1])
                ids = shard.tokens(first, last)
                for a, b in zip(starts[batch : batch + 4096] - first, ends[batch : batch + 4096] - first, strict=True):
                    seen.add(sha256(ids[a:b].tobytes()).digest()[:16])
                bar.advance(min(4096, len(ends) - batch))
            facts.append(_fact(shard))
    if path.is_dir():
        manifest, template = (known := load_manifest(path)).manifest_id, known.template
        said = [f"conversations written with the template {template['name']}: {template['turn']!r}"] if template else []
        facts = [f"manifest {manifest}", *said, *facts]
    all_lengths = np.concatenate(lengths)
    windows = [_shard_window(*place, window_tokens, tokenizer) for place in _places(shards, n_windows, window_tokens, seed)]
    return Look(facts, "tokens", all_lengths, len(all_lengths) - len(seen), windows, shards[0].meta.seq_len)


def _shards(path: Path) -> list[Shard]:
    return sorted(find_shards([path], None), key=lambda shard: (shard.meta.role, shard.meta.name))


def _tokenizer(tokenizer_path: str | None, shards: list[Shard]) -> Tokenizer | None:
    if not tokenizer_path:
        return None
    tokenizer, theirs = load_tokenizer(tokenizer_path), shards[0].meta.tokenizer["fingerprint"]
    if tokenizer.fingerprint != theirs:
        raise UserError(f"{tokenizer_path}: is tokenizer {tokenizer.fingerprint[:16]}, these shards were made with {theirs[:16]}. Give that one.")
    return tokenizer


def _fact(shard: Shard) -> str:
    meta = shard.meta
    masked = ""
    if "mask" in meta.files:
        counted = int(shard.loss_mask(0, meta.n_tokens).sum())
        masked = f", {counted / meta.n_tokens:.1%} of them carry loss"
    return (f"{meta.role}: {meta.name}: {meta.n_docs:,} documents, {meta.n_tokens:,} tokens{masked}, {meta.n_bytes:,} bytes of text, "
            f"{meta.dtype}, units: {len(meta.units)}, shard {meta.shard_id[:16]}")  # fmt: skip


def _places(shards: list[Shard], n: int, tokens: int, seed: int) -> list[tuple[Shard, int]]:
    draw = np.random.default_rng(seed)
    weights = np.array([shard.meta.n_tokens for shard in shards], float)
    chosen = [shards[i] for i in draw.choice(len(shards), n, p=weights / weights.sum())]
    return [(shard, int(draw.integers(max(1, shard.meta.n_tokens - tokens + 1)))) for shard in chosen]


def _shard_window(shard: Shard, start: int, n_tokens: int, tokenizer: Tokenizer | None) -> str:
    stop = min(start + n_tokens, shard.meta.n_tokens)
    ids, mask = shard.tokens(start, stop), shard.loss_mask(start, stop)
    mask = np.ones(len(ids), bool) if mask is None else mask
    ends = shard.doc_ends.astype(np.int64)
    first = int(np.searchsorted(ends, start, side="right"))
    borders = [start, *(int(end) for end in ends[first:] if end < stop), stop]
    pieces = [f"── {shard.meta.name}, tokens {start:,} to {stop:,}, document {first:,}"]
    for number, (a, b) in enumerate(pairwise(borders)):
        if number:
            pieces.append(f"── document {first + number:,}")
        pieces.append(_decoded(ids[a - start : b - start], mask[a - start : b - start], tokenizer))
    return "\n".join(pieces)


def _decoded(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """The text; between ‹ and › where no token carries loss."""
    text = ""
    for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(mask)) + 1):
        part = _visible(tokenizer.decode(ids[run].tolist())) if tokenizer else " ".join(map(str, ids[run].tolist()))
        text += _bracketed(part, bool(mask[run[0]]))
    return text


def _visible(text: str) -> str:
    return "".join(VISIBLE.get(char, char) for char in text)


def verify(path: Path) -> int:
    """Read every byte of the shards at `path` and hold it against its hash. Returns how many tokens that were. Raises ShardError."""
    shards = _shards(path)
    with progress(sum(shard.meta.files["bin"]["bytes"] for shard in shards), "verifying", "bytes") as bar:
        for shard in shards:
            verify_shard(shard, bar)
    return sum(shard.meta.n_tokens for shard in shards)


# lengths


def histogram(lengths: np.ndarray, width: int = 50) -> list[str]:
    """Lines for a terminal: documents by powers of two of their length."""
    bins = np.bincount(np.floor(np.log2(np.maximum(lengths, 1))).astype(int)).tolist()
    first, most = next(power for power, n in enumerate(bins) if n), max(bins)
    labels = {power: f"{2**power:,} to {2 ** (power + 1) - 1:,}" for power in range(first, len(bins))}
    widest = max(map(len, labels.values()))
    return [f"{label:>{widest}}  {'█' * -(-bins[power] * width // most):{width}} {bins[power]:,}" for power, label in labels.items()]


def draw(look: Look, title: str, out: Path) -> None:
    """The histogram as a PNG, and how much of all text is in documents up to each length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = np.sort(look.lengths)
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    edges = np.geomspace(max(1, lengths[0]), lengths[-1] + 1, 50)
    axes.hist(lengths, bins=edges, color="#4c72b0")
    axes.set_xscale("log")
    axes.set_xlabel(f"{look.unit} per document")
    axes.set_ylabel("documents")
    axes.set_title(f"{title}: {len(lengths):,} documents, {lengths.sum():,} {look.unit}")
    axes.axvline(lengths.mean(), color="#dd8452", label=f"mean {lengths.mean():,.0f}")
    axes.axvline(np.median(lengths), color="#55a868", label=f"median {np.median(lengths):,.0f}")
    if look.seq_len:
        axes.axvline(look.seq_len, color="black", linestyle="--", label=f"seq_len {look.seq_len:,}")
    share = axes.twinx()
    share.plot(lengths, np.cumsum(lengths) / lengths.sum(), color="#c44e52", label=f"share of {look.unit}")
    share.set_ylim(0, 1.02)
    share.set_ylabel(f"share of {look.unit} in documents up to this length")
    handles = [*axes.get_legend_handles_labels()[0], *share.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    with durable.new_file(out) as fresh:
        figure.savefig(fresh, dpi=120, format=out.suffix[1:] or "png")
    plt.close(figure)
