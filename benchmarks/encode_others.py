"""What others do to encode text, in a few lines each: encode_others.py NAME CORPUS TOKENIZER OUT WORKERS prints the number of tokens.

Each ends every document with end-of-text. Exit code 69: a package is missing.
"""

import json
import sys
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np


@cache
def tokenizer(folder: str):
    from llm.tokenizer import load_tokenizer

    found = load_tokenizer(folder)
    found.rank_encoder.encode("")
    return found


def encode(folder: str, text: str) -> np.ndarray:
    ids = tokenizer(folder).rank_encoder._encoding.encode_to_numpy(text, disallowed_special=())
    return np.append(ids, tokenizer(folder).eos_id).astype(np.uint16)


def stretch(corpus: str, number: int, of: int):
    """The lines that start in one of `of` equal stretches of the file."""
    size = Path(corpus).stat().st_size
    with open(corpus, "rb") as file:
        file.seek(max(0, size * number // of - 1))
        if number:
            file.readline()
        while file.tell() < size * (number + 1) // of and (line := file.readline()):
            yield line


def yardstick(corpus: str, folder: str, out: Path, workers: int) -> int:
    """tofile from each process: nothing checked, no index, no hash."""
    with get_context("spawn").Pool(workers) as pool:
        return sum(pool.starmap(yardstick_worker, [(corpus, folder, out, number, 16) for number in range(16)], chunksize=1))


def yardstick_worker(corpus: str, folder: str, out: Path, number: int, of: int) -> int:
    ids = np.concatenate([encode(folder, json.loads(line)["text"]) for line in stretch(corpus, number, of)])
    ids.tofile(out / f"{number}.bin")
    return len(ids)


def nanogpt(corpus: str, folder: str, out: Path, workers: int) -> int:
    """nanoGPT's data/openwebtext/prepare.py: datasets.map with lists of ids, then a memmap filled by batches."""
    import datasets

    datasets.disable_progress_bars()
    text = datasets.Dataset.from_json(corpus, cache_dir=str(out / "cache"))
    tokenized = text.map(nanogpt_row, remove_columns=["text"], num_proc=workers, fn_kwargs={"folder": folder})
    n_tokens = int(np.sum(tokenized["len"], dtype=np.uint64))
    target, at = np.memmap(out / "train.bin", np.uint16, "w+", shape=(n_tokens,)), 0
    for number in range(64):
        batch = np.concatenate(tokenized.shard(64, number, contiguous=True).with_format("numpy")["ids"][:])
        target[at : at + len(batch)] = batch
        at += len(batch)
    target.flush()
    return n_tokens


def nanogpt_row(row: dict, folder: str) -> dict:
    ids = tokenizer(folder).rank_encoder._encoding.encode_ordinary(row["text"])
    ids.append(tokenizer(folder).eos_id)
    return {"ids": ids, "len": len(ids)}


def one_writer(corpus: str, folder: str, out: Path, workers: int) -> int:
    """Megatron-LM's tools/preprocess_data.py: a pool that sends lists of ids to the one process that writes, 32 documents at a time."""
    n_tokens, lengths = 0, []
    with get_context("spawn").Pool(workers, one_writer_start, (folder,)) as pool, open(corpus) as lines, open(out / "data.bin", "wb") as target:
        for ids in pool.imap(one_writer_row, lines, 32):
            target.write(np.array(ids, dtype=np.uint16).tobytes(order="C"))
            lengths.append(len(ids))
            n_tokens += len(ids)
    np.array(lengths, np.int32).tofile(out / "data.idx")
    return n_tokens


def one_writer_start(folder: str) -> None:
    global _folder
    _folder = folder
    tokenizer(folder)


def one_writer_row(line: str) -> list[int]:
    ids = tokenizer(_folder)._hf.encode(json.loads(line)["text"], add_special_tokens=False).ids
    return [*ids, tokenizer(_folder).eos_id]


def datatrove(corpus: str, folder: str, out: Path, workers: int) -> int:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    parts = out / "parts"
    parts.mkdir()
    for number in range(workers):  # it deals out whole files
        (parts / f"{number}.jsonl").write_bytes(b"".join(stretch(corpus, number, workers)))
    steps = [JsonlReader(str(parts)), DocumentTokenizer(str(out / "ds"), tokenizer_name_or_path=f"{folder}/tokenizer.json", eos_token="<|endoftext|>",
                                                         shuffle_documents=False, local_working_dir=str(out / "local"))]  # fmt: skip
    LocalPipelineExecutor(steps, tasks=workers, workers=workers, logging_dir=str(out / "logs")).run()
    return sum(path.stat().st_size for path in (out / "ds").glob("*.ds")) // 2


def litdata(corpus: str, folder: str, out: Path, workers: int) -> int:
    from functools import partial

    from litdata import TokensLoader, optimize

    row = partial(litdata_rows, corpus, folder)
    optimize(row, list(range(16)), str(out / "chunks"), num_workers=workers, chunk_bytes="64MB", item_loader=TokensLoader())
    index = json.loads((out / "chunks" / "index.json").read_bytes())
    return sum(chunk["dim"] for chunk in index["chunks"])


def litdata_rows(corpus: str, folder: str, number: int):
    import torch

    for line in stretch(corpus, number, 16):
        yield torch.from_numpy(encode(folder, json.loads(line)["text"]).astype(np.int32))


def gigatoken_alone(corpus: str, folder: str, out: Path, workers: int) -> int:
    """Its own reader and threads, and nothing written."""
    import gigatoken

    encoder = gigatoken.Tokenizer(folder)
    with open(corpus, "rb") as lines:
        n_docs = sum(block.count(b"\n") for block in iter(lambda: lines.read(1 << 20), b""))
    return len(encoder.encode_files(gigatoken.JsonlFileSource([corpus])).layout.content) + n_docs


if __name__ == "__main__":
    name, corpus, folder, out, workers = sys.argv[1:]
    Path(out).mkdir()
    assert list(islice(stretch(corpus, 0, 1), 1))
    try:
        print(globals()[name.replace(" ", "_")](corpus, folder, Path(out), int(workers)))
    except ImportError as error:
        print(f"not installed: {error}")
        sys.exit(69)
