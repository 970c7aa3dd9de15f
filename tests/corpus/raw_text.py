"""Raw text for the tests of llm.corpus, and what became of it."""

import json
import random

import numpy as np

from llm.data.manifest import find_shards, load_manifest
from llm.tokenizer import load_tokenizer

WORDS = [f"word{i}" for i in range(500)]


def prose(seed, n_words):
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def write_jsonl(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def documents_of(folder, role="train"):
    """The ids of every document of a dataset, in order, without the end-of-text each must have."""
    documents = []
    for shard in find_shards([folder], role):
        ids = shard.tokens(0, shard.meta.n_tokens)
        for document in np.split(ids, shard.doc_ends.astype(np.int64)[:-1]):
            assert document[-1] == shard.meta.tokenizer["eos_id"]
            documents.append(document[:-1])
    return documents


def texts_of(folder, tokenizer_folder, role="train"):
    tokenizer = load_tokenizer(tokenizer_folder)
    return [tokenizer.decode(document) for document in documents_of(folder, role)]


def raw_texts(raw):
    texts = [path.read_text() for path in raw.glob("*.txt")]
    for path in raw.glob("*.jsonl"):
        texts += [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return texts


def contents(folder):
    """Bytes of every file by its name without the timestamp."""
    return {
        path.name.replace(stamp_of(path.name), "STAMP"): path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".bin", ".idx", ".mask") or path.name.endswith(".meta.json")
    }


def stamp_of(name):
    return name.split(".cached.64.")[1].split("-")[0]


def manifest_id(folder):
    return load_manifest(folder).manifest_id
