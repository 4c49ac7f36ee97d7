"""The programs of ``benchmarks/fuzz_assign.py``, and the problems that go through each."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import problems

from nat_jax import assign

SHAPES = (
    *((n, n) for n in (0, 1, 2, 3, 7, 16, 64, 257)),
    *((0, 3), (3, 0), (1, 7), (7, 1), (3, 7), (7, 3), (16, 64), (64, 16), (64, 257), (257, 64)),
)
OPTIONS = {
    "auction": (
        *("plain", "maximize", "eps=0.01", "eps=3e38", "max_rounds=3"),
        *("prices", "maximize+prices+max_rounds=1"),
    ),
    "scipy": ("plain", "maximize"),
    "hungarian": ("plain", "maximize"),
}


class Cell(NamedTuple):
    """One program."""

    solver: str
    shape: tuple[int, int]
    dtype: str
    way: str
    options: str

    def __str__(self) -> str:
        n, m = self.shape
        return f"{self.solver}/{n}x{m}/{self.dtype}/{self.way}/{self.options}"

    @classmethod
    def of(cls, text: str) -> "Cell":
        """Return the cell of that name."""
        solver, shape, dtype, way, options = text.split("/")
        n, m = map(int, shape.split("x"))
        return cls(solver, (n, m), dtype, way, options)

    @property
    def named(self) -> dict[str, Any]:
        """The options by name; that of prices is true."""
        pairs = (word.partition("=") for word in self.options.split("+") if word != "plain")
        values = {"eps": float, "max_rounds": int}
        return {name: values[name](value) if value else True for name, _, value in pairs}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of problems that fit the type."""
        integers = problems.DTYPES[self.dtype].kind in "biu"
        return problems.FINITE if integers else tuple(problems.KINDS)

    def size(self) -> int:
        """Return the number of problems: small ones, which are solved faster, are more."""
        area = self.shape[0] * self.shape[1]
        sizes = ((0, 16), (49, 640), (256, 448), (64 * 64, 112))
        return next((number for most, number in sizes if area <= most), 32)


class Case(NamedTuple):
    """One problem of a cell; the same whenever it is made."""

    cell: Cell
    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.cell}/{self.kind}/{self.seed}"

    def make(self) -> np.ndarray:
        """Return the cost, with the prices as one more row if the solver is given any."""
        cell, (n, m) = self.cell, self.cell.shape
        to = problems.DTYPES[cell.dtype]
        if n * m == 0:
            cost = np.zeros((n, m), to)
        else:
            cost = problems.make(self.kind, n, m, self.seed, cell.dtype)
        if "maximize" in cell.named and to.kind not in "biu":
            cost = -cost  # so that the same pairs are forbidden
        if "prices" not in cell.named:
            return cost
        return np.concatenate([cost, self._prices(cost).astype(to)[None]])

    def _prices(self, cost: np.ndarray) -> np.ndarray:
        """Return prices that help, or mislead, or are none."""
        rng = np.random.default_rng([self.seed, len(str(self))])
        values = cost.astype(np.float64)
        finite = np.where(np.isfinite(values), values, 0)
        size = np.abs(finite).max(initial=0)
        helpful = -finite.mean(axis=0) if len(finite) else np.zeros(cost.shape[1])
        noise = rng.standard_normal(cost.shape[1])
        special = rng.choice([0, 1e30, -3e38, np.inf, np.nan, 2**24 + 1], cost.shape[1])
        with np.errstate(all="ignore"):
            choices = (helpful, helpful + 0.1 * size * noise, 100 * size * noise, special)
            prices = choices[rng.integers(len(choices))]
            dtype = problems.DTYPES[self.cell.dtype]
            if dtype.kind in "biu":
                high = 1 if dtype == np.bool_ else np.iinfo(dtype).max
                low = 0 if dtype == np.bool_ else np.iinfo(dtype).min
                prices = np.clip(np.nan_to_num(prices), low, high)
            return prices.astype(dtype)


def pairs_of(cell: Cell) -> set[tuple]:
    """Return the pairs of values that a cell covers."""
    return set(itertools.combinations(enumerate(cell), 2))


def order(seed: int) -> Iterator[tuple[Cell, bool]]:
    """Yield the cells, and whether each is one of those that cover all pairs.

    Of a hundred at random always that one comes next that has most pairs not yet seen.
    """
    rng = np.random.default_rng(seed)
    cells = [
        Cell(solver, *rest)
        for solver in assign.SOLVERS
        for rest in itertools.product(SHAPES, problems.DTYPES, problems.WAYS, OPTIONS[solver])
    ]
    cells = [cells[k] for k in rng.permutation(len(cells))]
    missing = set().union(*map(pairs_of, cells))
    rest = list(cells)
    while missing:
        some = rng.choice(len(rest), 100, replace=False)
        best = max(some, key=lambda k: len(pairs_of(rest[k]) & missing))
        if not pairs_of(rest[best]) & missing:
            best = next(k for k, cell in enumerate(rest) if pairs_of(cell) & missing)
        missing -= pairs_of(rest[best])
        yield rest.pop(best), True
    # Small shapes first: many cases for each program.
    while rest:
        some = rng.choice(len(rest), 3)
        best = max(some, key=lambda k: rest[k].size())
        yield rest.pop(best), False


def solve(cell: Cell, given: np.ndarray) -> assign.Assignment:
    """Solve [k, n, m] of costs, or [k, n + 1, m] of costs and prices, in a cell's way."""
    options = cell.named
    priced = options.pop("prices", False)

    def call(x: Any) -> assign.Assignment:
        if not priced:
            return assign.solve(x, solver=cell.solver, **options)
        prices = x[..., -1, :].astype(np.float32)
        return assign.solve(x[..., :-1, :], solver=cell.solver, prices=prices, **options)

    return problems.run(cell.way, call, given)


def cases_of(cell: Cell, seed: int) -> list[Case]:
    """Return a cell's problems: its kinds in turn."""
    kinds = cell.kinds if 0 not in cell.shape else ("nothing",)
    return [
        Case(cell, kinds[k % len(kinds)], 1000 * seed + k // len(kinds)) for k in range(cell.size())
    ]
