"""What tells that a search has come to its end, and the curves that it leaves."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_fliqs.convergence import Convergence, Curves, Evidence, History, doubts


def curves(losses: list[float]) -> Curves:
    """Of 100 steps, with this training loss."""
    count = len(losses)
    steps = tuple(100 * (i + 1) // count for i in range(count))
    nothing = (None,) * count
    return Curves(steps, tuple(losses), nothing, nothing, nothing)


FLAT = curves([1.0] * 50)
GOOD = Evidence(
    curves=FLAT,
    choices=[5] * 10,
    final=(0,) * 10,
    entropy=0.02,
    favourites=(0,) * 10,
    earlier=(0,) * 10,
    frozen=75,
    steps=100,
    trained=True,
    untrained_loss=2.0,
    loss=1.0,
    lost=0.1,
)


def test_a_search_that_settled_has_converged() -> None:
    assert doubts(GOOD) == ()
    found = Convergence((), FLAT)
    assert found.converged
    assert found.warnings == ()


OTHER = (1,) * 3 + (0,) * 7


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (replace(GOOD, entropy=0.5), "undecided .*entropy 0.50, 27% of"),
        (replace(GOOD, earlier=OTHER), "3 of 10 decisions changed in the last quarter"),
        (replace(GOOD, favourites=OTHER), "3 of 10 decisions differ from .* favourites"),
        (replace(GOOD, frozen=90), "only 10 steps trained the fixed assignment alone"),
        (replace(GOOD, untrained_loss=1.0), "float model's own, which are served .loss 1"),
        (
            replace(GOOD, curves=curves([1 - i / 60 for i in range(50)])),
            "falling, by 33% .*from 0.3333 to 0.225",
        ),
    ],
)
def test_each_doubt_is_one_line_with_its_figures(evidence: Evidence, words: str) -> None:
    (reason,) = doubts(evidence)
    assert "\n" not in reason
    assert re.search(words, reason), reason
    found = Convergence((reason,), evidence.curves)
    assert not found.converged
    (warning,) = found.warnings
    assert warning.startswith("not converged, try more --steps: ")
    assert reason in warning


def test_what_always_moves_is_no_doubt() -> None:
    two = (1, 1, *(0,) * 8)
    # A decision mixed between two choices, to spend exactly the budget.
    mixed = math.log(2) / 10
    assert doubts(replace(GOOD, earlier=two, favourites=two, entropy=mixed)) == ()


def test_noise_is_no_fall() -> None:
    rng = np.random.default_rng(0)
    noisy = [float(x) for x in rng.lognormal(0, 0.3, 50)]
    assert doubts(replace(GOOD, curves=curves(noisy))) == ()


def test_where_nothing_is_lost_only_an_undecided_policy_is_a_doubt() -> None:
    bad = replace(GOOD, earlier=OTHER, favourites=OTHER, frozen=95, untrained_loss=1.0)
    assert len(doubts(bad)) == 4
    assert doubts(replace(bad, lost=0.004)) == ()
    assert doubts(replace(bad, lost=-0.1)) == ()
    assert len(doubts(replace(bad, lost=0.0, entropy=1.0))) == 1
    assert len(doubts(replace(bad, lost=math.nan))) == 4


def test_without_a_policy_or_weights_there_is_less_to_doubt() -> None:
    baseline = replace(GOOD, entropy=math.nan, favourites=None, earlier=None, frozen=0)
    assert doubts(baseline) == ()
    frozen = replace(baseline, trained=False, untrained_loss=1.0, steps=1)
    assert doubts(frozen) == ()
    one_choice = replace(GOOD, choices=[1] * 10, entropy=0.0)
    assert doubts(one_choice) == ()


def filled(steps: int, upto: int | None = None) -> History:
    history = History.empty(steps)
    for step in range(1, (steps if upto is None else upto) + 1):
        held_out = math.nan if step % 2 else 1.0
        history = history.added(
            step, steps, loss=float(step), held_out=held_out, cost=1.0, entropy=math.nan
        )
    return history


@settings(deadline=None, derandomize=True, max_examples=40)
@given(steps=st.integers(1, 400))
def test_curves_are_short_and_hold_every_step(steps: int) -> None:
    found = filled(steps).curves(steps)
    assert len(found.step) == min(steps, 50)
    assert found.step[-1] == steps
    assert list(found.step) == sorted(set(found.step))
    # The mean of a stretch of steps lies in its middle.
    ends = (0, *found.step)
    middles = [(a + 1 + b) / 2 for a, b in zip(ends, found.step, strict=False)]
    assert found.loss == pytest.approx(middles)
    assert set(found.entropy) == {None}
    assert set(found.cost) == {1.0}


def test_numbers_that_are_not_finite_leave_blanks() -> None:
    found = filled(10).curves(10)
    assert found.held_out == (None, 1.0) * 5
    json.dumps(Convergence((), found).to_dict(), allow_nan=False)


def test_curves_of_a_part_end_there() -> None:
    assert filled(100, upto=31).curves(100).step == tuple(range(2, 34, 2))
    assert History.empty(100).curves(100) == Curves((), (), (), (), ())
