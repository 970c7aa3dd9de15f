"""The order of samples: a keyed bijection on [0, n), computed where it is needed instead of stored as a table.

`feistel-splitmix64-6/v1`: a six-round Feistel network with the splitmix64 finaliser as its round function, walked until the
value falls below n. The name is part of every saved plan; other behaviour must get another name, or old runs would be reordered.
"""

import hashlib
import json

import numpy as np

ALGORITHM = "feistel-splitmix64-6/v1"
ROUNDS = 6
MAX_WALK = 1000  # a step stays above n with a chance below 3/4, so this many in a row means a bug


class Permutation:
    """A bijection on [0, n) for 1 <= n < 2^62, chosen by (seed, segment, epoch). Give it arrays: one index costs what 500 do."""

    def __init__(self, n: int, seed: int, segment: str, epoch: int):
        assert 1 <= n < 2**62, n
        self.n = n
        width = max(2, (n - 1).bit_length())
        self._half = np.uint64((width + width % 2) // 2)
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        key = json.dumps([ALGORITHM, seed, segment, epoch], separators=(",", ":"))
        self._keys = np.frombuffer(hashlib.sha512(key.encode("ascii")).digest(), "<u8")[:ROUNDS]

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Where each of these indices goes, int64."""
        return self._walk(indices, self._network)

    def inverse(self, images: np.ndarray) -> np.ndarray:
        """Which index goes to each of these, int64."""
        return self._walk(images, self._network_backwards)

    def _walk(self, values: np.ndarray, network) -> np.ndarray:
        assert values.size == 0 or 0 <= values.min() <= values.max() < self.n, (values.min(), values.max(), self.n)
        x = network(values.astype(np.uint64))
        outside = np.flatnonzero(x >= self.n)
        for _ in range(MAX_WALK):
            if len(outside) == 0:
                return x.astype(np.int64)
            x[outside] = walked = network(x[outside])
            outside = outside[walked >= self.n]
        raise AssertionError(f"cycle walking did not end: n={self.n} keys={self._keys}")

    def _network(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half) | right

    def _network_backwards(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys[::-1]:
            left, right = right ^ (_mix(left + key) & self._mask), left
        return (left << self._half) | right


def _mix(z: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser, wrapping mod 2^64. Works in place on the temporary it is given."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z
