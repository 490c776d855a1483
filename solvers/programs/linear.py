"""Mixed-integer linear programs as arrays, for HiGHS or any solver that PuLP knows.

HiGHS takes the arrays as they are, and PuLP is the door for the others: it wants an object for every column, row and
coefficient. A program of 10^4 rows with five columns each is stated to HiGHS in 10 ms by arrays and in 630 ms through PuLP, to
CBC in 310 ms (a shared Xeon, medians of nine: `python -m memplan.benchmarks.programs`), and a search for a plan states a dozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..face.answer import Status
from .names import DOORS, HIGHS, SolverError, find_class, unwarned, why_not

if TYPE_CHECKING:
    import highspy

Row = tuple[Sequence[int], Sequence[float], float]  # columns, their coefficients, and what these come to at least
NOTHING = np.empty(0)
SLACK = 1e-6  # by which a row may be missed in an answer, as a share of what it adds up: solvers print few digits


@dataclass(frozen=True)
class LinearProgram:
    """Minimise `cost @ x` subject to `lower <= x <= upper` and, for each row, `least <= row @ x <= most`.

    Attributes:
        cost: of each column.
        lower: the least value of each column.
        upper: and the largest; infinite where there is none.
        whole: of each column whether its value is a whole number.
        start: where each row begins in `column` and `value`, and where the last ends.
        column: columns of the rows' coefficients.
        value: the coefficients.
        least: of each row.
        most: likewise.
    """

    cost: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    whole: np.ndarray
    start: np.ndarray
    column: np.ndarray
    value: np.ndarray
    least: np.ndarray
    most: np.ndarray

    @property
    def row(self) -> np.ndarray:
        """The row of each coefficient."""
        return np.repeat(np.arange(len(self.least)), np.diff(self.start))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """What each row comes to."""
        return np.bincount(self.row, self.value * values[self.column], len(self.least))

    def holds(self, values: np.ndarray, slack: float = SLACK) -> bool:
        """Whether values meet every bound and row, but for a share of what is added up."""
        sums = self.sums(values)
        much = slack * (1 + np.bincount(self.row, np.abs(self.value * values[self.column]), len(self.least)))
        near = slack * (1 + np.abs(values))
        return bool(
            np.all((self.least - much <= sums) & (sums <= self.most + much))
            and np.all((self.lower - near <= values) & (values <= self.upper + near))
            and np.all(np.abs(values - np.round(values))[self.whole] <= slack * (1 + np.abs(values[self.whole])))
        )


@dataclass(frozen=True)
class Outcome:
    """A solver's answer.

    Attributes:
        status: what is known; what is optimal is so within the gap.
        values: of the columns; empty where none are known.
        bound: no values cost less; infinite where there are none, minus infinity where nothing is proven.
    """

    status: Status
    values: np.ndarray
    bound: float


def of_rows(
    cost: np.ndarray, lower: np.ndarray, upper: np.ndarray, rows: Sequence[Row], whole: np.ndarray | None = None
) -> LinearProgram:
    """A program with rows `coefficients @ columns >= bound`, in which no value need be whole if nothing is said."""
    counts = [len(columns) for columns, *_ in rows]
    return LinearProgram(
        cost=cost,
        lower=lower,
        upper=upper,
        whole=np.zeros(len(cost), bool) if whole is None else whole,
        start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        column=np.array([column for columns, *_ in rows for column in columns], np.int32),
        value=np.array([value for _, values, _ in rows for value in values], float),
        least=np.array([bound for _, _, bound in rows], float),
        most=np.full(len(counts), np.inf),
    )


def solve(
    program: LinearProgram,
    solver: str = HIGHS,
    seconds: float = np.inf,
    seed: int = 0,
    gap: float = 0.0,
    tolerance: float | None = None,
) -> Outcome:
    """The cheapest values found.

    Args:
        program: what to solve.
        solver: one of `names.NAMES`.
        seconds: to search for, at most.
        seed: of the search.
        gap: how far above the bound an answer may cost that ends the search, as a share of it.
        tolerance: by which whole numbers and rows may be missed; default: the solver's own.

    Raises:
        SolverError: the solver is not known or not installed, or gave up.
    """
    if solver == HIGHS:
        return by_highs(program, seconds, seed, gap, tolerance)
    found = find_class(solver) if solver in DOORS else None
    if found is None:
        raise SolverError(f"{solver} {why_not(solver)}")
    return by_pulp(program, solver, found, seconds, seed, gap, tolerance)


def highs_model(program: LinearProgram) -> "highspy.Highs":
    """A program in HiGHS, on one thread, to be changed and solved again."""
    import highspy

    lp: Any = highspy.HighsLp()  # its stubs promise lists, it takes arrays
    lp.num_col_, lp.num_row_ = len(program.cost), len(program.least)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = program.cost, program.lower, program.upper
    lp.row_lower_, lp.row_upper_ = program.least, program.most
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = program.start, program.column, program.value
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    model.setOptionValue("threads", 1)
    model.passModel(lp)
    if program.whole.any():
        whole, fraction = highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous
        kinds = np.array([whole if each else fraction for each in program.whole.tolist()])
        model.changeColsIntegrality(len(kinds), np.arange(len(kinds), dtype=np.int32), kinds)
    return model


def by_highs(program: LinearProgram, seconds: float, seed: int, gap: float, tolerance: float | None) -> Outcome:
    """What `solve` returns, by HiGHS."""
    import highspy

    model = highs_model(program)
    options = {"time_limit": seconds, "random_seed": seed, "mip_rel_gap": gap}
    if tolerance is not None:
        options |= {"mip_feasibility_tolerance": tolerance, "primal_feasibility_tolerance": tolerance}
    for option, value in options.items():
        model.setOptionValue(option, value)
    model.run()
    status, found, values = model.getModelStatus(), model.getInfo(), np.array(model.getSolution().col_value)
    if status == highspy.HighsModelStatus.kInfeasible:
        return Outcome(Status.INFEASIBLE, NOTHING, np.inf)
    best = status == highspy.HighsModelStatus.kOptimal
    bound = found.mip_dual_bound if program.whole.any() else found.objective_function_value if best else -np.inf
    if not len(values) or found.primal_solution_status != 2:
        return Outcome(Status.UNKNOWN, NOTHING, bound)
    return Outcome(Status.OPTIMAL if best else Status.FEASIBLE, values, bound)


def by_pulp(
    program: LinearProgram, name: str, solver: Any, seconds: float, seed: int, gap: float, tolerance: float | None
) -> Outcome:
    """What `solve` returns, by a class of PuLP's for the solver of that name.

    PuLP passes on no bound: an answer that is not optimal has none.
    """
    import pulp

    empty = np.diff(program.start) == 0  # no solver is given such rows
    if np.any(empty & ((program.least > 0) | (program.most < 0))):
        return Outcome(Status.INFEASIBLE, NOTHING, np.inf)
    if seconds <= 0:  # for some solvers that is no limit at all
        return Outcome(Status.UNKNOWN, NOTHING, -np.inf)
    with unwarned():
        model, columns = pulp_model(program)
        limit = None if np.isinf(seconds) else seconds
        made = solver(msg=False, **options_of(solver.__name__, limit, seed, gap, tolerance))
        try:
            model.solve(made)
        except Exception as error:  # each raises what its owner's library raises
            told = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise SolverError(f"{name} gave up: {told}") from error
    if model.status == pulp.LpStatusInfeasible:
        return Outcome(Status.INFEASIBLE, NOTHING, np.inf)
    known = [column.varValue for column in columns]
    if any(value is None for value in known):
        return Outcome(Status.UNKNOWN, NOTHING, -np.inf)
    values = np.array(known, float)
    values[program.whole] = np.where(
        np.abs(values - np.round(values)) <= SLACK * (1 + np.abs(values)), np.round(values), values
    )[program.whole]
    if not program.holds(values):
        return Outcome(Status.UNKNOWN, NOTHING, -np.inf)
    if model.status != pulp.LpStatusOptimal or model.sol_status != pulp.LpSolutionOptimal:
        return Outcome(Status.FEASIBLE, values, -np.inf)
    cost = float(program.cost @ values)
    return Outcome(Status.OPTIMAL, values, cost - gap * abs(cost))


def pulp_model(program: LinearProgram) -> tuple[Any, list[Any]]:
    """A program as PuLP has it, and its columns. Rows without columns are left out."""
    import pulp

    def limit(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    kinds = [pulp.LpInteger if whole else pulp.LpContinuous for whole in program.whole.tolist()]
    columns: list[Any] = [
        pulp.LpVariable(f"x{index}", limit(lower), limit(upper), kind)
        for index, (lower, upper, kind) in enumerate(zip(program.lower, program.upper, kinds, strict=True))
    ]
    model: Any = pulp.LpProblem("program", pulp.LpMinimize)
    model.addVariables(columns)
    model.setObjective(pulp.LpAffineExpression(list(zip(columns, program.cost.tolist(), strict=True))))
    ends, column, value = program.start.tolist(), program.column.tolist(), program.value.tolist()
    for row, (least, most) in enumerate(zip(program.least.tolist(), program.most.tolist(), strict=True)):
        inside = slice(ends[row], ends[row + 1])
        terms = [(columns[at], factor) for at, factor in zip(column[inside], value[inside], strict=True)]
        if not terms:
            continue
        if least == most:
            model.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintEQ, rhs=least))
            continue
        if np.isfinite(least):
            model.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintGE, rhs=least))
        if np.isfinite(most):
            model.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintLE, rhs=most))
    return model, columns


def options_of(name: str, seconds: float | None, seed: int, gap: float, tolerance: float | None) -> dict[str, Any]:
    """Keyword arguments of a class of PuLP's: each has names of its own for what it passes on, and some drop a gap of 0."""
    if name in ("PULP_CBC_CMD", "COIN_CMD"):
        exact = [] if tolerance is None else [f"primalT {tolerance}", f"integerT {tolerance}"]
        return {"timeLimit": seconds, "gapRel": gap, "options": [f"randomSeed {seed}", f"randomCbcSeed {seed}", *exact]}
    if name in ("SCIP_PY", "SCIP_CMD"):
        exact = [] if tolerance is None else [f"numerics/feastol={tolerance}"]
        return {"timeLimit": seconds, "gapRel": gap, "options": [f"randomization/randomseedshift={seed}", *exact]}
    if name in ("GUROBI", "GUROBI_CMD"):
        own: dict[str, Any] = {
            "OutputFlag": 0,
            "MIPGap": gap,
            "Seed": seed,
            "Threads": 1,
        }  # silence first, or it tells the rest
        own |= {} if tolerance is None else {"IntFeasTol": tolerance, "FeasibilityTol": tolerance}
        return {"timeLimit": seconds, **({"manageEnv": True, **own} if name == "GUROBI" else {"options": list(own.items())})}
    own = {"mip tolerances mipgap": gap, "randomseed": seed, "threads": 1}
    own |= {} if tolerance is None else {"mip tolerances integrality": tolerance, "simplex tolerances feasibility": tolerance}
    if name == "CPLEX_PY":
        return {"timeLimit": seconds, "threads": 1, **{key.replace(" ", "."): value for key, value in own.items()
                                                       if key != "threads"}}  # fmt: skip
    return {"timeLimit": seconds, "options": [f"set {key} {value}" for key, value in own.items()]}
