"""The most memory that this process has had."""

import resource
from pathlib import Path

__all__ = ["peak_bytes"]

_UNIT = 1024


def peak_bytes() -> int:
    """Peak of the resident memory.

    Linux hands ``ru_maxrss`` down to a child process, so that it would be at least what
    the parent had; the kernel's own count of this process is read where there is one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    peak = next(line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * _UNIT
