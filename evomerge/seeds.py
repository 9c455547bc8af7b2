"""Random generators, each derived from (seed, purpose, index) and owned by who asked for it.

Nothing in the package touches a global generator. Knows nothing of what the numbers are for.
"""

import hashlib

import numpy as np


def derive(seed: int, purpose: str, index: int = 0) -> int:
    """A 63-bit seed that depends on all three arguments and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A NumPy generator (PCG64) seeded by `derive`."""
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, index)))
