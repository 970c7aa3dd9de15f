"""Random number generators of this process as plain JSON."""

import base64
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from llm.checkpoint.manifest import read_small
from llm.checkpoint.slices import CheckpointError

MOST_BYTES = 1 << 20


def rng_state(device: str = "cpu") -> dict[str, Any]:
    """States of python, numpy and torch: on the CPU, and on `device` where that is a GPU of CUDA.

    A run on the CPU leaves a GPU beside it alone, which may be full or broken.
    """
    import torch

    version, python, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(python), gauss],
        "numpy": [algorithm, keys.tolist(), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state()),
    }
    if device.startswith("cuda"):
        state["cuda"] = _encode(torch.cuda.get_rng_state(device))
    return state


def load_rng_state(path: Path) -> None:
    """Put every generator back to where `rng_state` found it, from a rank's file in a checkpoint. Raises CheckpointError that names it."""
    try:
        set_rng_state(json.loads(read_small(path, MOST_BYTES)))
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{path}: holds no states of random number generators ({type(error).__name__}: {error}).") from None


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back to where `rng_state` found it."""
    import torch

    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    algorithm, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_decode(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decode(text: str):
    import torch

    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
