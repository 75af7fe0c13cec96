"""What happens at which step of a search."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from onnx_fliqs.config import SearchConfig
from onnx_fliqs.controller import Method
from onnx_fliqs.strategies import Strategy

__all__ = ["Phase", "Schedule"]

_COOLED: Final = 0.9
"""How far the critic's policy has cooled before the first step if weights train on its draws,
as a share: it should hardly change its mind any more."""
_EVALUATIONS: Final = 5
"""How often the frozen phase looks for its best weights, at most."""
_WARM_UP: Final = 20
_LEAST_RATE: Final = 0.05
"""The learning rate at the end, as a share of the largest."""


class Phase(enum.Enum):
    """What a step is for."""

    OBSERVE = "observe"
    """Before the first step: a round of draws on the float network; nothing trains."""
    DELAY = "delay"
    SEARCH = "search"
    FROZEN = "frozen"


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
    rounds: int
    """Rounds of observation before the first step."""
    refinements: Mapping[int, int]
    """Step → number of the refinement that comes before it, 1 for the first."""
    evaluations_from: int
    """The first step after which the best weights are looked for, of all strategies."""
    learning_rate: float
    """The largest."""

    @classmethod
    def of(cls, config: SearchConfig) -> "Schedule":
        """The times that the settings ask for; the baselines have the frozen phase only."""
        searches = config.strategy is Strategy.FLIQS
        last = min(round(config.freeze * config.steps), config.steps - 1)
        freeze = last if searches else 0
        delay = min(round(config.delay * config.steps), freeze)
        observes = searches and config.controller.method is Method.CRITIC
        count = config.refine if config.refines else 0
        refinements = {round(freeze * n / count): n for n in range(1, count + 1)}
        return cls(
            steps=config.steps,
            delay=delay,
            freeze=freeze,
            look_back=freeze - (freeze - delay) // 4,
            rounds=round(config.observe * config.steps) if observes else 0,
            refinements=refinements,
            evaluations_from=last,
            learning_rate=config.learning_rate,
        )

    @property
    def reports(self) -> int:
        """Rounds of observation and steps together: each makes one."""
        return self.rounds + self.steps

    @property
    def refines(self) -> bool:
        """Whether weights train on an assignment that is refined, not on draws."""
        return bool(self.refinements)

    def phase(self, step: int) -> Phase:
        """Of the step that comes after so many."""
        if step >= self.freeze:
            return Phase.FROZEN
        return Phase.DELAY if step < self.delay else Phase.SEARCH

    def evaluates(self, step: int) -> bool:
        """Whether the frozen weights are measured after so many steps."""
        every = -(-(self.steps - self.evaluations_from) // _EVALUATIONS)
        return step > self.evaluations_from and (self.steps - step) % every == 0

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then a cosine down to a twentieth."""
        warm = min(1.0, (step + 1) / min(_WARM_UP, self.steps))
        cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.learning_rate * warm * (_LEAST_RATE + (1 - _LEAST_RATE) * cosine)

    def observed(self, number: int) -> float:
        """How far the policy has cooled in a round of observation, 0 for the first, up to 1.

        Where weights train on an assignment, that is chosen when all rounds are over.
        """
        return (1.0 if self.refines else _COOLED) * number / self.rounds

    def cooled(self, step: int) -> float:
        """How far the policy has cooled, up to 1 when the assignment is fixed.

        It starts at the end of the delay: from 0, or from where observation left off.
        """
        if self.refines:
            return 1.0
        start = _COOLED if self.rounds else 0.0
        passed = (step - self.delay) / max(1, self.freeze - self.delay)
        return start + (1 - start) * passed
