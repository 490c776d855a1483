"""Every way to place buffers on every small instance: it keeps its word, and what is small it solves."""

from functools import partial

import numpy as np
import pytest
from contract import keeps_its_word
from memplan.solvers.face.answer import Limit, Status
from memplan.solvers.storage.instances import cut_rectangle
from memplan.solvers.storage.methods import METHODS, method
from memplan.solvers.storage.problem import FREE, fault, peak_of
from packings import faults, make, smallest_peak

INSTANCES = {
    "nothing": make([], []),
    "one": make([5], [[(0, 3)]]),
    "side by side": make([4, 6, 3], [[(0, 2)], [(2, 5)], [(5, 9)]]),
    "all at once": make([4, 6, 3], [[(0, 9)], [(1, 5)], [(2, 7)]]),
    "no order is as good as its load": make([3, 2, 2, 3, 2], [[(0, 2)], [(1, 4)], [(3, 6)], [(5, 8)], [(0, 7)]]),
    "a gap": make([4, 4, 2], [[(0, 2), (6, 9)], [(2, 6)], [(1, 7)]]),
    "alignment": make([5, 3, 6], [[(0, 4)], [(1, 5)], [(2, 6)]], alignment=4),
    "a pin": make([4, 3, 2], [[(0, 4)], [(1, 5)], [(2, 6)]], pin=[FREE, 5, FREE]),
    "pins that clash": make([4, 3], [[(0, 4)], [(1, 5)]], pin=[0, 2]),
    "empty ones": make([5, 0, 5, 3], [[(1, 4)], [(0, 5)], [(4, 5), (6, 8)], [(2, 5)]], alignment=4),
    "a rectangle": cut_rectangle(6, 3, height=60)[0],
    "a frayed one": cut_rectangle(7, 4, height=60, fray=0.3)[0],
}


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("name", METHODS)
def test_every_way_keeps_its_word(name, instance):
    """Asked for the smallest peak, for that peak, and for a byte less; each is settled."""
    storage = INSTANCES[instance]
    least = smallest_peak(storage)
    for enough in (None, least, least - 1) if least else (None,):
        answer = method(name)(storage, Limit(enough, 10.0))
        keeps_its_word(answer, least, partial(peak_of, storage), partial(fault, storage), enough)
        fits = least is not None and (enough is None or least <= enough)
        assert answer.status is (Status.OPTIMAL if fits else Status.INFEASIBLE)


@pytest.mark.parametrize("instance", INSTANCES)
def test_the_check_agrees_with_all_pairs(instance):
    """It finds something wrong exactly where the obvious check does."""
    storage, rng = INSTANCES[instance], np.random.default_rng(0)
    for _ in range(50):
        offset = rng.integers(-1, 12, len(storage))
        assert bool(fault(storage, offset)) == bool(faults(storage, offset))
