"""What happens at which step of a search."""

import enum
import math
from dataclasses import dataclass
from typing import Final

from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import Method
from onnx_fliqs.strategies import Strategy

__all__ = ["Phase", "Schedule"]

_COOLED: Final = 0.9
"""How far the critic's policy has cooled before the first step if weights train on its draws,
as a share: it should hardly change its mind any more."""
_EVALUATED_FROM: Final = 0.6
"""Share of the steps after which the best weights are looked for, unless the assignment is
fixed later."""
_EVALUATIONS: Final = 5
"""How often they are looked for, at most."""
_WARM_UP: Final = 20
_LEAST_RATE: Final = 0.05
"""The learning rate at the end, as a share of the largest."""


class Phase(enum.Enum):
    """What a step is for."""

    MEASURE = "measure"
    """Before the first step: single changes of format are scored on a batch."""
    OBSERVE = "observe"
    """Before the first step: a round of draws is scored on the float network."""
    DELAY = "delay"
    """The weights train on uniform draws; the policy is told the scores, and stays uniform."""
    SEARCH = "search"
    """The weights train on draws of the policy, which learns from them."""
    TRAIN = "train"
    """The assignment is fixed, and the weights train on it."""

    @property
    def trains(self) -> bool:
        """Whether weights train; what comes before them has numbers of its own."""
        return self not in (Phase.MEASURE, Phase.OBSERVE)


@dataclass(frozen=True, slots=True)
class Schedule:
    """The times of a search, in steps done before something happens."""

    steps: int
    delay: int
    """Until then formats are drawn uniformly."""
    freeze: int
    """When the assignment is fixed."""
    look_back: int
    """When what would be fixed is noted, to see at the end whether it was still changing."""
    measures: bool
    """Whether single changes of format are measured before the first step."""
    rounds: int
    """Rounds of observation before the first step."""
    evaluations_from: int
    """The first step after which the best weights are looked for, of all strategies."""
    learning_rate: float
    """The largest."""

    @classmethod
    def of(cls, config: SearchConfig) -> "Schedule":
        """The times that the settings ask for; the baselines train only."""
        last = config.steps - 1
        freeze = min(round(config.freeze * config.steps), last)
        delay = min(round(config.delay * config.steps), freeze)
        critic = config.controller.method is Method.CRITIC
        observes = critic and config.strategy is Strategy.FLIQS
        rounds = round(config.observe * config.steps) if observes else 0
        return cls(
            steps=config.steps,
            delay=delay,
            freeze=freeze,
            look_back=freeze - (freeze - delay) // 4,
            measures=observes and (freeze == 0 or rounds > 0),
            rounds=rounds,
            evaluations_from=max(freeze, min(round(_EVALUATED_FROM * config.steps), last)),
            learning_rate=config.learning_rate,
        )

    @property
    def reports(self) -> int:
        """Rounds of observation and steps together: each makes one."""
        return self.rounds + self.steps

    @property
    def draws(self) -> bool:
        """Whether weights train on draws of the policy at first."""
        return self.freeze > 0

    def phase(self, step: int) -> Phase:
        """Of the step that comes after so many."""
        if step >= self.freeze:
            return Phase.TRAIN
        return Phase.DELAY if step < self.delay else Phase.SEARCH

    def evaluates(self, step: int) -> bool:
        """Whether the weights are measured after so many steps."""
        every = -(-(self.steps - self.evaluations_from) // _EVALUATIONS)
        return step > self.evaluations_from and (self.steps - step) % every == 0

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine down to a twentieth."""
        warm = min(1.0, (step + 1) / min(_WARM_UP, self.steps))
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * warm * (_LEAST_RATE + (1 - _LEAST_RATE) * cosine)

    def observed(self, number: int) -> float:
        """How far the policy has cooled in a round of observation, 0 for the first, up to 1.

        Where weights do not train on draws, the assignment is fixed when all rounds are over.
        """
        return (_COOLED if self.draws else 1.0) * number / self.rounds

    def cooled(self, step: int) -> float:
        """How far the policy has cooled, up to 1 when the assignment is fixed.

        It starts at the end of the delay: from 0, or from where observation left off.
        """
        if step >= self.freeze:
            return 1.0
        start = _COOLED if self.rounds else 0.0
        passed = max(0, step - self.delay) / max(1, self.freeze - self.delay)
        return start + (1 - start) * passed
