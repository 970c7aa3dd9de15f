"""A recipe's documents as one .jsonl file: from the files it names or from files at hand, all of them or a sample."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from llm.corpus.convert import write_documents, write_jsonl
from llm.corpus.documents import Document
from llm.corpus.fetch import fetch
from llm.corpus.read_all import read_all
from llm.corpus.recipes import RECIPES, Recipe
from llm.log import UserError


def collect(
    dataset: str, out: Path, max_bytes: int | None = None, inputs: list[str] | None = None, sample: float = 1.0,
    rewrite: Callable[[Document], Document] | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Write the documents of a recipe to `out`, whole ones, up to `max_bytes` of text; `inputs`: its files, where they are at hand.

    Which documents are in a sample depends on their texts alone. Returns how many documents, and how many bytes of text.
    """
    recipe, sizes = RECIPES[dataset], []
    limit = max_bytes or recipe.max_bytes or float("inf")

    def chosen() -> Iterator[Document]:
        n_bytes = 0
        for document in _documents(dataset, recipe, out, inputs, sample):
            size = len(document.text.encode())
            if n_bytes + size <= limit:  # else a shorter one may still fit
                n_bytes += size
                sizes.append(size)
                yield rewrite(document) if rewrite else document
        if not sizes:
            raise UserError(f"dataset {dataset!r} has no text here within {limit:,} bytes. Raise --max-bytes or --sample, or bring text of your own.")

    return write_documents(chosen(), out, write_jsonl), sum(sizes)


def _documents(dataset: str, recipe: Recipe, out: Path, inputs: list[str] | None, sample: float) -> Iterator[Document]:
    if recipe.local and not inputs:
        for name, text in recipe.local():
            if _is_chosen(Document(text, name, 0), sample):
                yield Document(text, name, 0)
        return
    if not inputs and not recipe.files:
        raise UserError(f"dataset {dataset!r} cannot be downloaded: {recipe.about}. Give its files with --from.")
    paths, share = (inputs, sample) if inputs else fetch(recipe, out.parent / f".{dataset}.files", sample)
    if recipe.layout and not inputs:
        recipe.layout(paths, out.with_suffix(""))
    for document in read_all(list(map(str, paths)), recipe.options):
        if _is_chosen(document, share):
            changed = document if document.conversation else replace(document, text=recipe.change(document.text))
            if changed.text.strip():
                yield changed


def _is_chosen(document: Document, share: float) -> bool:
    """By a hash of its own, else a sample would take away the validation split, which goes by content too."""
    return share >= 1 or int.from_bytes(hashlib.sha256(b"sample" + document.identity()).digest()[:8], "big") < share * 2**64
