"""Loss spikes: how one is told from noise.

A step's loss is compared with the running mean and standard deviation of the steps before it. What is done about a
spike is the recipe's choice: dropping the update costs one step; going back to the last checkpoint and passing over
the sequences since then is what PaLM did (Chowdhery et al. 2022, section 5.1), whose spikes did not come back there.
"""

import math
from dataclasses import dataclass

HORIZON = 50
"""Steps over which the running mean and variance forget."""
MIN_STEPS = 20
"""Steps that must have been seen before a loss can be called a spike; a loss that is not finite always is one."""
MAX_IN_A_ROW = 10
"""Updates dropped one after another, or returns to one checkpoint, after which the run stops: it would not end."""


@dataclass(frozen=True)
class Trend:
    """Running mean and variance of the loss, in nats, over the steps so far that were no spike."""

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def then(self, loss: float) -> "Trend":
        weight = max(1 / (self.count + 1), 1 / HORIZON)
        difference = loss - self.mean
        variance = (1 - weight) * (self.variance + weight * difference**2)
        return Trend(self.count + 1, self.mean + weight * difference, variance)

    def is_spike(self, loss: float, deviations: float) -> bool:
        """Whether `loss` lies more than so many standard deviations above the mean."""
        if not math.isfinite(loss):
            return True
        return self.count >= MIN_STEPS and loss > self.mean + deviations * math.sqrt(self.variance)
