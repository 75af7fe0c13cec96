"""What a search tells while it runs."""

from dataclasses import dataclass

from onnx_fliqs.schedule import Phase

__all__ = ["Progress"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a step reports."""

    step: int
    """1 for the first; of batches while single changes are measured, of rounds while the
    critic observes."""
    steps: int
    phase: Phase
    loss: float
    """Training loss of this step; NaN if nothing trains."""
    held_out: float
    """Loss on held-out samples, where it was measured, else NaN: the mean of the policy's
    draws, or that of the fixed assignment."""
    cost: float
    """Expected cost as a share of the budget; of several, the largest share. NaN while single
    changes are measured."""
    entropy: float
    """Mean entropy of the policy, in nats; NaN where there is none."""
    quality: float | None
    """Quality of the fixed assignment on the held-out samples, when it was measured."""
