"""The Pallas program, interpreted without a GPU: it is trusted no further than its certificate."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from problems import assert_solved, is_matching, make, optimum, total

from nat_jax.assign import (
    Status,
    _auction,
    _bidding,
    _certificate,
    _kernel,
    _paths,
    _problem,
    auction,
)
from nat_jax.assign._problem import enable_x64

INTEGRAL = ["ties", "constant", "integer", "machol_wien"]
KINDS = [
    *INTEGRAL,
    "uniform",
    "sphere",
    "collapsed",
    "matched",
    "tenths",
    "huge",
    "wild",
    "forbidden",
]
ROUGH_EPS = (1e-2, 1e-3, 0.0)
NO_LIMIT = 2**31 - 1
N = 32  # of most tests, which so share a compiled program
ROUNDING = 1e-6  # of prices that rise along many paths


def on_a_gpu() -> bool:
    return jax.default_backend() == "gpu"


def solve(*arguments: jax.Array) -> _kernel.Ended:
    return _kernel.solve(*arguments, interpret=not on_a_gpu())


lowers_for_a_gpu = pytest.mark.skipif(
    jaxlib.version.__version_info__ > (0, 10, 2),
    reason="later versions compile for the GPU while lowering, which takes the CUDA plugin",
)


class Given(NamedTuple):
    problem: _problem.Standard
    prices: jax.Array
    levels: jax.Array
    max_rounds: jax.Array
    grain: jax.Array

    @property
    def arguments(self) -> tuple[jax.Array, ...]:
        return (self.problem.cost, *self[1:])


@jax.jit
def prepare(cost: jax.Array) -> Given:
    n, m = cost.shape
    problem = _problem.standardise(cost, False)
    finite = problem.cost < jnp.inf
    prices = jnp.zeros(m, jnp.float32)
    if n == m:
        prices = -jnp.sum(problem.cost, axis=0, where=finite) / jnp.sum(finite, axis=0)
    levels = jnp.array(ROUGH_EPS if n == m else ROUGH_EPS[-1:], jnp.float32)
    grain = jnp.where(problem.integral, 1 / problem.unit, 0)
    return Given(problem, prices, levels, jnp.int32(NO_LIMIT), grain)


@jax.jit
def run(given: Given) -> _kernel.Ended:
    return solve(*given.arguments)


@jax.jit
def certify(cost: jax.Array, given: Given, ended: _kernel.Ended) -> _certificate.Solved:
    col4row = _bidding.columns_of_rows(ended.owner, cost.shape[0])
    matching = _paths.Matching(
        ended.prices,
        ended.owner,
        col4row,
        jnp.int32(0),
        jnp.any(col4row < 0),
        jnp.bool_(False),
        ended.rounds,
    )
    return _certificate.certify(cost, given.problem, matching)


@jax.jit
def off_by_more_than(given: Given, ended: _kernel.Ended, eps: float) -> jax.Array:
    """Count the pairs that are more than eps worse than the row's best."""
    kept = _bidding.release(given.problem.cost, ended.prices, ended.owner, jnp.float32(eps))
    return jnp.sum((ended.owner >= 0) & (kept < 0))


@pytest.mark.parametrize("shape", [(16, 24), pytest.param((64, 64), marks=pytest.mark.slow)])
def test_every_kind_is_solved(shape: tuple[int, int]) -> None:
    n, m = shape
    for kind in KINDS:
        cost = make(kind, n, m)
        given = prepare(cost)
        ended = run(given)
        assert ended.prices.shape == ended.owner.shape == (m,)
        assert int(off_by_more_than(given, ended, ROUNDING)) == 0
        solved = certify(cost, given, ended)
        assert int(solved.status) == Status.OPTIMAL_WITHIN_EPS, kind
        col4row = np.asarray(solved.col4row)
        assert is_matching(col4row, n, m)
        gap, scale = float(solved.gap), np.ptp(cost[np.isfinite(cost)]) or 1.0
        assert total(cost, col4row) - optimum(cost) <= gap <= 1e-6 * n * scale, kind
        if kind in INTEGRAL:
            assert gap == 0, kind


def test_wrong_results_are_noticed() -> None:
    """What the caller relies on, since a program may have been miscompiled."""
    cost = make("uniform", N)
    given = prepare(cost)
    ended = run(given)
    swapped = ended._replace(owner=ended.owner.at[jnp.array([0, 1])].set(ended.owner[1::-1]))
    assert int(off_by_more_than(given, swapped, ROUNDING)) > 0
    assert float(certify(cost, given, swapped).gap) > 1e-3
    stale = ended._replace(prices=given.prices)
    assert int(off_by_more_than(given, stale, ROUNDING)) > 0
    freed = ended._replace(owner=ended.owner.at[0].set(-1))
    assert int(certify(cost, given, freed).status) == Status.INFEASIBLE


def test_a_row_that_cannot_be_matched_is_left_out() -> None:
    cost = make("uniform", N)
    cost[:2] = np.inf
    cost[:2, 3] = 0.5
    given = prepare(cost)
    owner = np.asarray(run(given).owner)
    rows = owner[owner >= 0]
    assert len(rows) == len(set(rows.tolist())) == N - 1
    assert owner[3] in (0, 1)
    nothing = prepare(np.full((N, N), np.inf, np.float32))
    assert np.all(np.asarray(run(nothing._replace(prices=jnp.zeros(N, jnp.float32))).owner) == -1)


def test_the_round_limit_is_kept() -> None:
    cost = make("uniform", N)
    given = prepare(cost)
    full = run(given)
    seen = set()
    for limit in (0, 1, int(full.rounds) // 2, int(full.rounds)):
        ended = run(given._replace(max_rounds=jnp.int32(limit)))
        assert int(ended.rounds) == limit
        rows = np.asarray(ended.owner[ended.owner >= 0])
        assert len(rows) == len(set(rows.tolist()))
        assert int(off_by_more_than(given, ended, ROUGH_EPS[0])) == 0
        seen.add(len(rows))
    np.testing.assert_array_equal(ended.owner, full.owner)
    assert len(seen) > 2 and max(seen) == N


def test_prices_are_a_start() -> None:
    cost = make("uniform", N)
    cold = run(prepare(cost))
    given = prepare(cost)._replace(prices=cold.prices, levels=jnp.zeros(3, jnp.float32))
    warm = run(given)
    assert int(warm.rounds) < int(cold.rounds) / 2
    assert float(certify(cost, given, warm).gap) <= 1e-6 * N


@pytest.mark.slow
def test_a_phase_that_ties_bring_to_a_standstill(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cost = (1 + 2.0**-22 * rng.integers(0, 4, (64, 64))).astype(np.float32)
    given = prepare(cost)
    settled = run(given)
    monkeypatch.setattr(_kernel, "STALLED", 1)
    on_foot = jax.jit(lambda *given: solve(*given))(*given.arguments)
    for ended in (settled, on_foot):
        assert float(certify(cost, given, ended).gap) <= 1e-6 * 64 * np.ptp(cost)
    assert int(settled.rounds) < int(on_foot.rounds)


def test_vmap_is_a_program_for_each_problem() -> None:
    costs = [make(kind, 16, 24) for kind in ("uniform", "ties", "collapsed", "forbidden")]
    given = [prepare(cost) for cost in costs]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *given)
    together = jax.jit(jax.vmap(solve))(*batch.arguments)
    for k, one in enumerate(given):
        jax.tree.map(lambda x, y, k=k: np.testing.assert_array_equal(x[k], y), together, run(one))
    assert len(set(np.asarray(together.rounds).tolist())) > 1
    assert grids(jax.vmap(_kernel.solve), batch.arguments) == [(4,)]
    assert grids(_kernel.solve, given[0].arguments) == [()]


def grids(function: Any, arguments: tuple[jax.Array, ...]) -> list[tuple[int, ...]]:
    """Return the grids of the kernels that a function launches."""
    equations = jax.make_jaxpr(function)(*arguments).eqns
    kernels = [e for e in equations if e.primitive.name == "pallas_call"]
    return [e.params["grid_mapping"].grid for e in kernels]


@lowers_for_a_gpu
@pytest.mark.parametrize("wide", [False, True])
def test_it_lowers_for_a_gpu(wide: bool) -> None:
    # Cost, prices, levels, max_rounds and grain.
    arguments = [
        jax.ShapeDtypeStruct(shape, "int32" if k == 3 else "float32")
        for k, shape in enumerate([(256, 300), (300,), (2,), (), ()])
    ]
    with enable_x64(wide):
        lowered = jax.jit(_kernel.solve).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @__gpu$xla.gpu.triton") == 1


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `auction` take the program where only the interpreter runs it, too."""
    search = partial(_auction._search_in_kernel, interpret=not on_a_gpu())
    monkeypatch.setattr(_auction, "_search_in_loops", search)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("interpreted")
def test_auctions_through_the_program() -> None:
    batch = np.stack([make(kind, 16, 24) for kind in KINDS])
    solved = auction(batch, kernel=True)
    for k, cost in enumerate(batch):
        assert_solved(cost, jax.tree.map(lambda x, k=k: x[k], solved))


BREAKAGES: dict[str, Callable[[_kernel.Ended], _kernel.Ended]] = {
    "swapped": lambda e: e._replace(owner=e.owner.at[jnp.array([0, 1])].set(e.owner[1::-1])),
    "row twice": lambda e: e._replace(owner=e.owner.at[0].set(e.owner[1])),
    "no row": lambda e: e._replace(owner=e.owner.at[0].set(10**9)),
    "far below": lambda e: e._replace(owner=e.owner.at[0].set(-(2**31))),
    "nothing done": lambda e: e._replace(owner=jnp.full_like(e.owner, -1)),
    "wrong prices": lambda e: e._replace(prices=-e.prices),
    "no prices": lambda e: e._replace(prices=jnp.full_like(e.prices, jnp.nan)),
}


def test_a_wrong_program_costs_time_only() -> None:
    cost = make("uniform", N)
    given = prepare(cost)
    right = run(given)
    given, right = given._replace(levels=given.levels[-1]), right._replace(rounds=jnp.int32(0))
    ends = [right, *(breakage(right) for breakage in BREAKAGES.values())]

    @jax.jit
    @jax.vmap
    def finish(ended: _kernel.Ended) -> _certificate.Solved:
        matching = _auction._keep_what_holds(
            given.problem.cost, ended, given.levels, given.max_rounds
        )
        return _certificate.certify(jnp.asarray(cost), given.problem, matching)

    solved = finish(jax.tree.map(lambda *x: jnp.stack(x), *ends))
    assert int(solved.rounds[0]) == 0
    for k in range(len(ends)):
        assert is_matching(np.asarray(solved.col4row[k]), N, N)
        assert 0 <= float(solved.gap[k]) <= 1e-6 * N
        assert total(cost, np.asarray(solved.col4row[k])) <= optimum(cost) + float(solved.gap[k])
    assert np.all(np.asarray(solved.rounds[1:]) > 0)


@lowers_for_a_gpu
def test_the_option_decides() -> None:
    def programs(m: int, platform: str, **options: Any) -> int:
        traced = jax.jit(partial(auction, **options)).trace(jax.ShapeDtypeStruct((8, m), "float32"))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("__gpu$xla.gpu.triton")

    assert programs(8, "cuda", kernel=True) == 1
    assert programs(2049, "cuda", kernel=True) == programs(8, "cuda", kernel=False) == 0
    assert programs(8, "cpu", kernel=True) == 0
