"""Mixed-integer programs: every solver that is installed against brute force, and what is said of those that are not."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memplan.solvers.face.answer import Status
from memplan.solvers.programs import names
from memplan.solvers.programs.linear import LinearProgram, highs_model, of_rows, solve
from memplan.solvers.programs.names import NAMES, SolverError, why_not

HERE = [name for name in NAMES if not why_not(name)]
TOP = 3  # the largest value of a column that must be whole


@st.composite
def programs(draw: Any) -> LinearProgram:
    """Up to five columns that are whole, with rows bounded on either side, on both, or on none."""
    columns, rows = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    few = st.integers(-4, 4)
    table = np.array([[draw(few) for _ in range(columns)] for _ in range(rows)], float).reshape(rows, columns)
    lower = np.array([draw(st.integers(-1, 1)) for _ in range(columns)], float)
    middle = [draw(st.integers(-6, 6)) for _ in range(rows)]
    kinds = [draw(st.sampled_from(["least", "most", "both", "equal"])) for _ in range(rows)]
    least = [-np.inf if kind == "most" else low for kind, low in zip(kinds, middle, strict=True)]
    most = [np.inf if kind == "least" else low + 3 * (kind == "both") if kind != "most" else low
            for kind, low in zip(kinds, middle, strict=True)]  # fmt: skip
    where = np.nonzero(table)
    return LinearProgram(
        cost=np.array([draw(few) for _ in range(columns)], float),
        lower=lower,
        upper=np.full(columns, float(TOP)),
        whole=np.ones(columns, bool),
        start=np.concatenate([[0], np.cumsum((table != 0).sum(axis=1))]).astype(np.int32),
        column=where[1].astype(np.int32),
        value=table[where],
        least=np.array(least, float),
        most=np.array(most, float),
    )


def cheapest(program: LinearProgram) -> float:
    """The least cost, by trying everything; infinite where nothing fits."""
    best = np.inf
    for values in itertools.product(*(range(int(low), TOP + 1) for low in program.lower)):
        x = np.array(values, float)
        sums = [sum(program.value[at] * x[program.column[at]] for at in range(*program.start[row : row + 2]))
                for row in range(len(program.least))]  # fmt: skip
        if np.all(program.least <= sums) and np.all(sums <= program.most):
            best = min(best, float(program.cost @ x))
    return best


@pytest.mark.parametrize("solver", HERE)
@settings(max_examples=40)
@given(program=programs())
def test_every_solver_finds_the_optimum(solver: str, program: LinearProgram):
    """Of whole columns, with its proof; and says where nothing fits."""
    wanted, found = cheapest(program), solve(program, solver, 20.0, tolerance=1e-9)
    if wanted == np.inf:
        assert (found.status, found.bound, len(found.values)) == (Status.INFEASIBLE, np.inf, 0)
        return
    assert found.status is Status.OPTIMAL
    assert program.holds(found.values)
    assert program.cost @ found.values == pytest.approx(wanted, abs=1e-6)
    assert found.bound == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("solver", HERE)
def test_fractions_are_allowed_where_nothing_is_said(solver: str):
    """x + y >= 1.5 with 2 x <= 1: the relaxation takes halves, the whole program does not. Neither y nor z has an upper end."""
    rows = [([0, 1], [1.0, 1.0], 1.5), ([0], [-2.0], -1.0)]
    ends = np.zeros(3), np.array([1.0, np.inf, np.inf])
    for whole, cost, x in ((False, 2.5, [0.5, 1.0, 0.0]), (True, 4.0, [0.0, 2.0, 0.0])):
        found = solve(of_rows(np.array([1.0, 2.0, 0.0]), *ends, rows, np.full(3, whole)), solver)
        assert found.status is Status.OPTIMAL
        assert found.bound == pytest.approx(cost)
        assert found.values[:2] == pytest.approx(x[:2])


def knapsack(items: int) -> LinearProgram:
    """One that takes long: values next to weights, and half of them fit."""
    rng = np.random.default_rng(0)
    weight = rng.integers(10**6, 10**7, items).astype(float)
    rows = [(range(items), -np.roll(weight, by), -weight.sum() / 2) for by in range(8)]
    return of_rows(-weight, np.zeros(items), np.ones(items), rows, np.ones(items, bool))


@pytest.mark.parametrize("solver", HERE)
def test_when_time_is_up_what_is_known_is_told(solver: str):
    """Values that hold, if there are any, and a bound that no optimum is below."""
    program = knapsack(60)
    found = solve(program, solver, 0.3)
    assert found.status in (Status.FEASIBLE, Status.UNKNOWN)
    assert found.bound <= 0
    assert (found.status is Status.UNKNOWN) == (len(found.values) == 0)
    if len(found.values):
        assert program.holds(found.values)
        assert found.bound <= program.cost @ found.values


@pytest.mark.parametrize("solver", HERE)
def test_no_time_is_a_limit_too(solver: str):
    """Nothing is found in none, by a program that presolving does not solve."""
    assert solve(knapsack(60), solver, 0.0).status is not Status.OPTIMAL


def test_rows_that_do_not_hold_are_seen():
    """Above, below, and between whole numbers."""
    program = of_rows(np.ones(2), np.zeros(2), np.full(2, 5.0), [([0, 1], [1.0, 1.0], 2.0)], np.array([True, False]))
    assert program.holds(np.array([1.0, 1.0]))
    assert program.holds(np.array([1.0, 1.0 - 1e-9]))
    assert not program.holds(np.array([1.0, 0.9]))
    assert not program.holds(np.array([0.5, 4.0]))
    assert not program.holds(np.array([0.0, 6.0]))


def test_a_model_can_be_changed_and_solved_again():
    """As bounds are, warm."""
    import highspy

    model = highs_model(of_rows(np.ones(1), np.zeros(1), np.full(1, 9.0), [([0], [1.0], 2.0)]))
    for least in (2.0, 5.0):
        model.changeRowBounds(0, least, highspy.kHighsInf)
        model.run()
        assert model.getInfo().objective_function_value == least


@pytest.mark.parametrize("name", ["glpk", "", "HIGHS", 3, None])
def test_a_solver_that_is_not_known_is_told_with_those_that_are(name: Any):
    """Also what is no name at all."""
    assert why_not(name) == "is not known: the solvers are highs, cbc, scip, gurobi, cplex"
    with pytest.raises(SolverError, match="is not known"):
        solve(knapsack(2), name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != names.HIGHS])
def test_a_solver_that_is_not_there_is_told_with_what_to_install(monkeypatch, name: str):
    """None of PuLP's classes works, or PuLP has dropped them."""
    import pulp

    for candidate in names.DOORS[name].classes:
        monkeypatch.delattr(pulp, candidate)
    assert why_not(name) == names.DOORS[name].missing
    assert "\n" not in why_not(name)
    with pytest.raises(SolverError, match=f"^{name} is not installed"):
        solve(knapsack(2), name)


def test_a_solver_that_gives_up_is_told_in_a_line(monkeypatch):
    """What its library raises, by name."""
    import pulp

    def gives_up(self, lp):
        raise RuntimeError("Model too large\nfor this licence.")

    monkeypatch.setattr(pulp.PULP_CBC_CMD, "actualSolve", gives_up)
    with pytest.raises(SolverError, match=r"^cbc gave up: Model too large for this licence$"):
        solve(knapsack(2), "cbc")
