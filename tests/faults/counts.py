"""What the fault tests have done, for the last lines of `make torture`; and its seed."""

import os
from collections import Counter

import pytest

TORTURE = bool(os.environ.get("TORTURE"))
SEED = int(os.environ.get("TORTURE_SEED") or (int.from_bytes(os.urandom(3), "big") if TORTURE else 0))
"""`make test` always takes the same one; `make torture` another each time, and prints it."""
torture = pytest.mark.skipif(not TORTURE, reason="in make torture")
done = Counter()


def lines() -> list[str]:
    return [f"{what}: {n:,}" for what, n in sorted(done.items())]
