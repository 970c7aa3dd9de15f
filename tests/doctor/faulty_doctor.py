"""tools/doctor.py with a fault: FAULT=matmul:1 has rank 1 multiply wrong, matmul-bits:1 in the last bit only, sum:1 add wrong, leave:1 go away."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import doctor

from llm import cli


def spoil(kind: str) -> None:
    from llm.dist import World
    from llm.doctor import ranks

    products, sum_tensor = ranks.products, World.sum_tensor

    def wrong_products(device: str):
        whole, *fractions = products(device)
        if kind == "leave":
            os._exit(7)
        (whole if kind == "matmul" else fractions[0])[3, 4] *= 1 + 2**-23 if kind == "matmul-bits" else 2
        return [whole, *fractions]

    def wrong_sum(world, tensor):
        sum_tensor(world, tensor)
        tensor[5] += 1

    if kind == "sum":
        World.sum_tensor = wrong_sum
    else:
        ranks.products = wrong_products


def rank() -> str:
    """Of this process, which may have been started by the first one."""
    return sys.argv[sys.argv.index("--peer") + 1].split(",")[0] if "--peer" in sys.argv else "0"


if __name__ == "__main__":
    kind, _, whose = os.environ["FAULT"].partition(":")
    if whose == rank():
        spoil(kind)
    cli.run(doctor.main)
