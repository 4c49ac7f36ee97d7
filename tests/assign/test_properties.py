"""Every solver on every kind of problem, size, type and way of calling: the properties hold.

Each cell is one compiled program, through which one problem of every kind goes, three times: as it
is, once more, and with its rows and columns in another order. The cells cover every solver with
every size, type, way and sense; ``benchmarks/fuzz_assign.py`` runs through their whole product.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import SHARES, Draw, calls, faults_of
from hypothesis import given, settings
from problems import (
    DTYPES,
    KINDS,
    MODES,
    Fault,
    differences,
    disagreement,
    faults,
    make,
    relabel,
    run,
    stack,
    value_changes,
)

from nat_jax import assign
from nat_jax.assign import Assignment, Status


@cache  # what jit has compiled for it is found again by the same object alone
def function(solver: str, maximize: bool) -> Callable[[jax.Array], Assignment]:
    return partial(assign.solve, solver=solver, maximize=maximize)


class Cell(NamedTuple):
    solver: str
    n: int
    m: int
    dtype: str = "float32"
    mode: str = "batched"
    maximize: bool = False

    def __str__(self) -> str:
        sense = "max" if self.maximize else "min"
        return f"{self.solver}-{self.n}x{self.m}-{self.dtype}-{self.mode}-{sense}"

    def solve(self, costs: np.ndarray) -> Assignment:
        return run(self.mode, function(self.solver, self.maximize), costs)

    def stack(self) -> tuple[tuple[str, ...], np.ndarray]:
        return stack(self.n, self.m, dtype=self.dtype, maximize=self.maximize)


CELLS = (
    Cell("auction", 1, 1, "uint8", "batched"),
    Cell("auction", 2, 2, "int16", "jit", True),
    Cell("auction", 3, 3, "float64", "batched"),
    *(Cell("auction", 7, 7, "float32", mode) for mode in MODES),
    Cell("auction", 64, 64, "bfloat16", "batched"),
    Cell("auction", 257, 257, "float32", "batched"),
    Cell("auction", 7, 3, "bool", "vmap", True),
    Cell("auction", 16, 64, "float16", "scan", True),
    Cell("auction", 64, 16, "int8", "eager"),
    Cell("scipy", 1, 1, "int16", "vmap", True),
    Cell("scipy", 7, 7, "float32", "jit"),
    Cell("scipy", 7, 7, "float32", "scan"),
    Cell("scipy", 64, 64, "bfloat16", "vmap"),
    Cell("scipy", 3, 7, "float16", "batched", True),
    Cell("scipy", 16, 64, "bool", "eager", True),
    Cell("scipy", 64, 16, "uint32", "batched"),
    Cell("hungarian", 7, 7, "float32", "eager"),
    Cell("hungarian", 7, 7, "float32", "batched"),
    Cell("hungarian", 16, 16, "uint8", "batched"),
    Cell("hungarian", 64, 64, "float64", "jit"),
    Cell("hungarian", 3, 7, "float32", "batched"),
    Cell("hungarian", 7, 3, "bfloat16", "vmap", True),
)
# What else it takes for every solver to meet every size, type and way.
MORE_CELLS = (
    Cell("auction", 3, 3, "int32", "batched"),
    Cell("auction", 16, 16, "uint32", "vmap", True),
    Cell("auction", 3, 7, "float32", "batched"),
    Cell("auction", 7, 3, "float32", "batched"),
    Cell("scipy", 2, 2, "uint8", "batched"),
    Cell("scipy", 3, 3, "float32", "batched"),
    Cell("scipy", 16, 16, "int32", "batched", True),
    Cell("scipy", 257, 257, "float64", "batched", True),
    Cell("scipy", 7, 3, "int8", "jit"),
    Cell("hungarian", 1, 1, "uint32", "scan", True),
    Cell("hungarian", 2, 2, "int32", "vmap", True),
    Cell("hungarian", 3, 3, "bool", "batched", True),
    Cell("hungarian", 257, 257, "float16", "batched", True),
    Cell("hungarian", 16, 64, "int8", "batched", True),
    Cell("hungarian", 64, 16, "int16", "batched"),
)


def one(results: Assignment, k: int) -> Assignment:
    return jax.tree.map(lambda leaf: leaf[k], results)


@cache
def solved(cell: Cell) -> Assignment:
    return cell.solve(cell.stack()[1])


def all_faults(cell: Cell) -> list[tuple[str, Fault]]:
    """Return what is wrong with any problem of a cell, after its kind."""
    kinds, costs = cell.stack()
    others = relabel(costs)
    once, again, relabelled = solved(cell), cell.solve(costs), cell.solve(others)
    found = []
    for k, kind in enumerate(kinds):
        result, other = one(once, k), one(relabelled, k)
        judge = partial(faults, maximize=cell.maximize, share=SHARES[cell.solver])
        found += [
            (kind, fault)
            for fault in (
                *judge(costs[k], result),
                *judge(others[k], other),
                *disagreement(kind, costs[k], result, maximize=cell.maximize),
                *differences(result, one(again, k)),
                *value_changes(costs[k], result, others[k], other),
            )
        ]
    return found


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_kind_is_solved(cell: Cell) -> None:
    assert all_faults(cell) == []


@pytest.mark.slow
@pytest.mark.parametrize("cell", MORE_CELLS, ids=str)
def test_every_kind_is_solved_in_the_other_ways_too(cell: Cell) -> None:
    assert all_faults(cell) == []


@pytest.mark.parametrize("solver", assign.SOLVERS)
def test_all_ways_of_calling_agree(solver: str) -> None:
    same = [c for c in CELLS if c[:4] == (solver, 7, 7, "float32") and not c.maximize]
    first, *others = (solved(cell) for cell in same)
    assert others
    assert not np.array_equal(first.col4row[0], first.col4row[1])
    for other in others:
        np.testing.assert_array_equal(other.col4row, first.col4row)
        np.testing.assert_array_equal(other.status, first.status)


@pytest.mark.parametrize("solver", assign.SOLVERS)
def test_pairs_unpack_as_scipys(solver: str) -> None:
    wanted = [cell for cell in CELLS if cell.solver == solver and cell.n != cell.m]
    assert wanted
    for cell in wanted:
        result = solved(cell)
        row_ind, col_ind = result
        assert row_ind.shape == col_ind.shape == (len(result.col4row), min(cell.n, cell.m))
        for rows, columns, col4row in zip(row_ind, col_ind, result.col4row, strict=True):
            np.testing.assert_array_equal(rows, np.flatnonzero(col4row >= 0))
            np.testing.assert_array_equal(columns, col4row[np.asarray(rows)])


@pytest.mark.parametrize("solver", assign.SOLVERS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (2, 0, 3), (0, 3, 3)])
def test_nothing_to_match(solver: str, shape: tuple[int, ...]) -> None:
    *batch, n, m = shape
    for dtype in DTYPES.values():
        result = assign.solve(np.zeros(shape, dtype), solver=solver).check()
        assert result.cost.shape == result.gap.shape == result.rounds.shape == tuple(batch)
        assert result.prices.shape == (*batch, m)
        assert result.col4row.shape == (*batch, n)
        assert result.row_ind.shape == result.col_ind.shape == (*batch, min(n, m))
        if not batch:
            assert faults(np.zeros(shape, dtype), jax.device_get(result)) == []


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(calls(("auction",), shapes=((3, 3), (3, 7)), priced=(True,)))
def test_drawn_problems_are_solved(draw: Draw) -> None:
    assert faults_of(draw) == []


def test_feasibility_is_what_scipy_says() -> None:
    rng = np.random.default_rng(0)
    costs = rng.integers(0, 4, (300, 4, 5)).astype(np.float32)
    costs[rng.random(costs.shape) < 0.6] = np.inf
    results = jax.device_get(assign.auction(costs))
    for k, cost in enumerate(costs):
        assert faults(cost, one(results, k)) == []
    assert set(results.status.tolist()) == {Status.INFEASIBLE, Status.OPTIMAL_WITHIN_EPS}


def _swap_two(r: Assignment, cost: np.ndarray) -> Assignment:
    swapped = r.col4row.copy()
    swapped[:2] = swapped[1::-1]
    held = cost[np.flatnonzero(swapped >= 0), swapped[swapped >= 0]].astype(np.float64)
    return dataclasses.replace(r, col4row=swapped, cost=np.float32(held.sum()))


def _column(column: int) -> Callable[[Assignment, np.ndarray], Assignment]:
    return _with(col4row=lambda col4row: np.concatenate([np.int32([column]), col4row[1:]]))


def _with(**leaves: Any) -> Callable[[Assignment, np.ndarray], Assignment]:
    """Replace leaves by values of their own type, or by a function of themselves."""

    def broken(r: Assignment, _: np.ndarray) -> Assignment:
        old = {name: getattr(r, name) for name in leaves}
        return dataclasses.replace(
            r, **{k: v(old[k]) if callable(v) else old[k].dtype.type(v) for k, v in leaves.items()}
        )

    return broken


def _swap_with_gap(gap: float) -> Callable[[Assignment, np.ndarray], Assignment]:
    return lambda r, cost: _with(gap=gap)(_swap_two(r, cost), cost)


Breakage = Callable[[Assignment, np.ndarray], Assignment]
BREAKAGES: dict[str, tuple[str, str, Breakage]] = {
    # the check that must notice, a kind, how its result is broken
    "suboptimal": ("value", "uniform", _swap_two),
    "suboptimal integers": ("value", "integer", _swap_two),
    "suboptimal, and says so": ("accuracy", "uniform", _swap_with_gap(10)),
    "suboptimal integers, and says so": ("exact", "integer", _swap_with_gap(1e4)),
    "column twice": ("matching", "uniform", lambda r, c: _column(r.col4row[1])(r, c)),
    "column beyond": ("matching", "uniform", _column(7)),
    "row left out": ("matching", "uniform", _column(-1)),
    "indices of 64 bits": ("matching", "uniform", _with(col4row=np.int64)),
    "wrong total": ("total", "uniform", _with(cost=lambda cost: cost + np.float32(1e-5))),
    "total of the negative": ("total", "uniform", _with(cost=np.negative)),
    "total of 64 bits": ("types", "uniform", _with(cost=np.float64)),
    "wrong prices": ("prices", "uniform", _with(prices=np.negative)),
    "infinite prices": ("prices", "uniform", _with(prices=lambda prices: prices + np.inf)),
    "negative gap": ("gap", "uniform", _with(gap=np.negative)),
    "no gap": ("gap", "uniform", _with(gap=np.nan)),
    "a gap for NaN": ("gap", "nan", _with(gap=1.0)),
    "a gap for the impossible": ("gap", "infeasible", _with(gap=1.0)),
    "loose gap": ("accuracy", "uniform", _with(gap=1e-4)),
    "loose gap of integers": ("exact", "integer", _with(gap=1e-4)),
    "NaN unseen": ("status", "nan", _with(status=Status.OPTIMAL_WITHIN_EPS)),
    "-inf unseen": ("status", "minus_inf", _with(status=Status.OPTIMAL_WITHIN_EPS)),
    "infeasible unseen": ("status", "infeasible", _with(status=Status.OPTIMAL_WITHIN_EPS)),
    "feasible unseen": ("status", "forbidden", _with(status=Status.INFEASIBLE)),
    "stopped without a limit": ("status", "uniform", _with(status=Status.MAX_ROUNDS)),
    "too many rounds": ("rounds", "uniform", _with(rounds=1000)),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_checks_notice(breakage: str) -> None:
    check, kind, break_it = BREAKAGES[breakage]
    cell = Cell("auction", 7, 7)
    kinds, costs = cell.stack()
    cost, result = costs[kinds.index(kind)], one(solved(cell), kinds.index(kind))
    assert faults(cost, result) == []
    assert check in [fault.check for fault in faults(cost, break_it(result, cost))]


def test_float64_narrowed_too_early_would_be_noticed() -> None:
    cell = Cell("auction", 3, 3, "float64")
    kinds, costs = cell.stack()
    k = kinds.index("offset")
    cost = costs[k] + 1e9  # float32 holds a constant matrix
    assert faults(cost, one(cell.solve(costs + 1e9), k)) == []
    narrowed = one(cell.solve((costs + 1e9).astype(np.float32).astype(np.float64)), k)
    assert "value" in [fault.check for fault in faults(cost, narrowed)]


def test_a_total_that_is_not_scipys_would_be_noticed() -> None:
    cost = make("uniform", 7)
    result = one(solved(Cell("auction", 7, 7)), tuple(KINDS).index("uniform"))
    assert disagreement("uniform", cost, result) == []
    assert disagreement("uniform", cost, _swap_two(result, cost)) != []


def test_an_unsteady_solver_would_be_noticed() -> None:
    results = solved(Cell("auction", 7, 7))
    assert differences(results, results) == []
    for leaf in ("col4row", "cost", "prices", "gap", "rounds", "status"):
        changed = dataclasses.replace(results, **{leaf: jnp.add(getattr(results, leaf), 1)})
        assert [fault.message.split(":")[0] for fault in differences(results, changed)] == [leaf]


def test_a_solver_that_goes_by_labels_would_be_noticed() -> None:
    cost = make("uniform", 7)
    other = relabel(cost)
    by_label = dataclasses.replace(
        one(solved(Cell("auction", 7, 7)), 0), col4row=np.arange(7, dtype=np.int32)
    )
    assert value_changes(cost, by_label, cost, by_label) == []
    assert value_changes(cost, by_label, other, by_label) != []
