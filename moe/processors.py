"""How much of the machine this process may use."""

import os


def processors() -> int:
    """Returns how many processors this process may use, where the system says so; else all."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
