"""How long threads that compute together wait for each other with their cores held: shortly, so that a busy machine stays usable.

GNU OpenMP, which PyTorch computes with on a CPU, lets a thread that has nothing to do spin some 300,000 times before it
gives its core back. On a quiet machine that is cheap. Beside other processes the spinning threads hold the cores that the
one with the work is waiting for, and a small training step takes ten times as long. `docs/performance.md` has the figures.
"""

from __future__ import annotations

import os

# Measured with benchmarks/busy_machine.py.
SPINS = 1_000

# Variables by which a user says how threads wait: GNU's, everyone's, and those of Intel's and LLVM's OpenMP.
CHOSEN_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")


def bound_spinning() -> bool:
    """Bound the spin of this process and of those it starts, unless the user has chosen; return whether that was done.

    Works only before torch is imported: OpenMP reads the variable when it is loaded.
    """
    if any(name in os.environ for name in CHOSEN_BY):
        return False
    os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    return True
