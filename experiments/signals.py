"""Being asked to stop: SIGTERM, agreed upon by all processes."""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils

# Processes agree by a collective, which is worth a few steps' delay.
_STEPS_BETWEEN_AGREEMENTS = 8


class StopSignal:
    """Notes SIGTERM, and tells the loop at a step that all processes share."""

    def __init__(self) -> None:
        self._received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: object) -> None:
        self._received = True

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`: the same answer in every process."""
        if jax.process_count() == 1:
            return self._received
        if step % _STEPS_BETWEEN_AGREEMENTS:
            return False
        return bool(np.any(multihost_utils.process_allgather(np.array(self._received))))
