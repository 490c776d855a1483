"""Every way to map a step on every small instance: it keeps its word, and the room's check knows what is wrong."""

import random
from dataclasses import replace
from functools import partial

import pytest
from contract import keeps_its_word
from mappings import fewest_bytes, make_problem
from memplan.solvers.face.answer import Limit, Status
from memplan.solvers.scratchpad.methods import METHODS, method
from memplan.solvers.scratchpad.problem import Mapped, Residency, cost_of, fault, with_capacity
from memplan.solvers.scratchpad.spm import peaks

EXACT = {"auto", "best first", "walls", "cosma"}
CHAIN = Residency((4, 8, 9, 9, 8), ((0,), (1,), (2,), (3, 1)), ((1,), (2,), (3,), (4,)), 25)


def halfway(seed: int, ops: int) -> Residency:
    """A random graph, and a scratchpad between its largest op and its smallest peak."""
    problem = make_problem(random.Random(seed), ops)
    return with_capacity(problem, sum(peaks(problem)) // 2)


INSTANCES = {
    "no op": Residency((), (), (), 8),
    "one op": Residency((5, 3), ((0,),), ((1,),), 9, (1,)),
    "one op too large": Residency((5, 3), ((0,),), ((1,),), 7, (1,)),
    "a chain with a skip": CHAIN,
    "the same with room": with_capacity(CHAIN, 26),
    "too large in the middle": with_capacity(CHAIN, 16),
    **{f"random {seed}": halfway(seed, 4) for seed in range(8)},
}


@pytest.mark.parametrize("instance", INSTANCES)
@pytest.mark.parametrize("name", METHODS)
def test_every_way_keeps_its_word(name, instance):
    """And those that look at all orders end with a proof."""
    problem = INSTANCES[instance]
    least = fewest_bytes(problem)
    answer = method(name)(problem, Limit(seconds=20.0))
    keeps_its_word(answer, least, lambda mapped: cost_of(problem, mapped.dropped), partial(fault, problem))
    assert (answer.status is Status.INFEASIBLE) == (least is None)
    assert least is None or name not in EXACT or answer.status is Status.OPTIMAL


def test_the_check_names_what_is_wrong():
    """One fault each, in a mapping that has none."""
    good = Mapped((0, 1, 2, 3), frozenset({(1, 3)}), 16)
    assert not fault(CHAIN, good)
    for wrong, said in (
        (replace(good, order=(0, 1, 2)), "not every op runs once"),
        (replace(good, order=(1, 0, 2, 3)), "op 1 runs before op 0"),
        (replace(good, dropped=frozenset({(1, 2)})), "does not use it again"),
        (replace(good, dropped=frozenset(), bytes=0), "step 2 has 1 bytes too many"),
        (replace(good, bytes=8), "16 bytes move, not 8"),
    ):
        assert said in fault(CHAIN, wrong)
