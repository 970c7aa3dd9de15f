"""Files of a dataset from the Hugging Face hub or an address: told with their size first, resumed, and held against their hashes."""

import fnmatch
import http.client
import math
import shutil
import time
import urllib.request
from pathlib import Path

from llm import durable
from llm.checkpoint.hashes import file_sha256
from llm.corpus.recipes import Recipe
from llm.log import UserError, log

TRIES, FIRST_PAUSE_S = 5, 1.0


def fetch(recipe: Recipe, folder: Path, sample: float) -> tuple[list[Path], float]:
    """As many of the recipe's files as hold `sample` of it, in `folder`, and the share of their documents that makes the sample.

    What is there already and whole is not fetched again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.repo:
        return _from_hub(recipe, folder, sample)
    chosen = recipe.files[: math.ceil(len(recipe.files) * sample)]
    log.info(f"{len(chosen)} of {len(recipe.files)} files, {recipe.size} in all, to {folder}")
    return [from_address(address, folder / address.rpartition("/")[2]) for address in chosen], sample * len(recipe.files) / len(chosen)


def _from_hub(recipe: Recipe, folder: Path, sample: float) -> tuple[list[Path], float]:
    try:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.utils import logging as hub_logging
    except ImportError:
        raise UserError('downloading needs huggingface_hub: pip install "tally-llm[data]". Or fetch the files yourself and give --from.') from None
    hub_logging.set_verbosity_error()  # it tells of each retry
    log.info(f"{recipe.repo}: asking the hub for its files")
    try:
        tree = HfApi().list_repo_tree(recipe.repo, repo_type="dataset", recursive=True)
        entries = sorted((e for e in tree if hasattr(e, "size") and any(fnmatch.fnmatch(e.path, p) for p in recipe.files)), key=lambda e: e.path)
        if not entries:
            raise UserError(f"{recipe.repo} has no file {' or '.join(recipe.files)} any more. Fetch the files yourself and give --from.")
        chosen = entries[: math.ceil(len(entries) * sample)]
        _tell(recipe, chosen, len(entries), folder)
        paths = []
        for number, entry in enumerate(chosen, 1):
            log.info(f"file {number} of {len(chosen)}: {entry.path}, {entry.size / 1e6:,.1f} MB")
            path = Path(hf_hub_download(recipe.repo, entry.path, repo_type="dataset", local_dir=folder))
            check_file(path, entry.size, entry.lfs.sha256 if entry.lfs else None)
            paths.append(path)
        return paths, sample * len(entries) / len(chosen)
    except UserError:
        raise
    except Exception as error:  # whatever its HTTP library of the day raises
        raise UserError(f"{recipe.repo}: cannot be fetched ({_first_line(error)}). Run again: what has come is kept. Or give --from.") from None


def _tell(recipe: Recipe, chosen: list, n_files: int, folder: Path) -> None:
    n_bytes, free = sum(entry.size for entry in chosen), shutil.disk_usage(folder).free
    log.info(f"{recipe.repo} ({recipe.licence}): {len(chosen):,} of {n_files:,} files, {n_bytes / 1e6:,.1f} MB, to {folder}")
    if n_bytes > free:
        raise UserError(f"{folder}: {free / 1e6:,.0f} MB free, and {n_bytes / 1e6:,.0f} MB would come. Give a smaller --sample, or another --out.")


def check_file(path: Path, size: int | None, sha256: str | None) -> None:
    """Raises UserError, and takes the file away, where it is not what was promised."""
    if (size is not None and path.stat().st_size != size) or (sha256 and file_sha256(path) != sha256):
        path.unlink()
        raise UserError(f"{path}: did not arrive whole; removed. Run again.")


def from_address(address: str, path: Path) -> Path:
    """The file at an address, a small one: it is in memory as a whole."""
    for attempt in range(TRIES):
        if path.exists():
            break
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:  # IncompleteRead is one
            if attempt + 1 == TRIES or getattr(error, "code", 500) in (403, 404):
                raise UserError(f"{address}: cannot be fetched ({_first_line(error)}). Run again: what has come is kept.") from None
            time.sleep(FIRST_PAUSE_S * 2**attempt)
        else:
            durable.write_bytes(path, content)
            path.with_name(path.name + ".part").unlink(missing_ok=True)  # of an earlier version
    return path


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
