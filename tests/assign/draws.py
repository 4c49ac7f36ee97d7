"""Problems drawn by hypothesis: few special values, many ties, any options."""

from typing import Any, NamedTuple

import jax
import numpy as np
from hypothesis import strategies as st
from problems import Fault, faults

from nat_jax import assign

# The dual values of a finished matching add up along paths, so they are a little coarser.
SHARES = {"auction": 1e-6, "scipy": 3e-6, "hungarian": 3e-6}
# Few, because each compiles.
SHAPES = ((2, 2), (3, 3), (3, 7), (7, 3))

_SPECIAL = (
    *(0.0, -0.0, 1.0, 0.1, 1e-45, 1e-38, 1e-30, 1e-7, 1 + 2.0**-23, 2.0**24 - 1, 2.0**24),
    *(1e30, 3e38, float("inf"), float("-inf"), float("nan")),
)
_VALUES = st.one_of(
    st.integers(-3, 3).map(float),
    st.sampled_from(_SPECIAL),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


class Draw(NamedTuple):
    """One call of a solver."""

    cost: np.ndarray
    solver: str
    options: dict[str, Any]


@st.composite
def calls(
    draw: st.DrawFn,
    solvers: tuple[str, ...] = tuple(assign.SOLVERS),
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    priced: tuple[bool, ...] = (False, True),
) -> Draw:
    """Draw a cost of few different values and what else a solver is given."""
    n, m = draw(st.sampled_from(shapes))
    palette = draw(st.lists(_VALUES, min_size=1, max_size=6))
    entries = draw(st.lists(st.sampled_from(palette), min_size=n * m, max_size=n * m))
    cost = np.array(entries, np.float32).reshape(n, m)
    solver = draw(st.sampled_from(solvers))
    options: dict[str, Any] = {}
    if solver == "auction":
        options["eps"] = draw(st.sampled_from((0.0, 1e-30, 0.01, 1.0, 3e38)))
        options["max_rounds"] = draw(st.sampled_from((None, 0, 1, 3)))
        if draw(st.sampled_from(priced)):
            prices = draw(st.lists(_VALUES, min_size=m, max_size=m))
            options["prices"] = np.array(prices, np.float32)
    return Draw(cost, solver, options)


def faults_of(draw: Draw) -> list[Fault]:
    """Return all that is wrong with what the solver makes of it."""
    result = jax.device_get(assign.solve(draw.cost, solver=draw.solver, **draw.options))
    return faults(
        draw.cost,
        result,
        share=SHARES[draw.solver],
        eps=draw.options.get("eps", 0.0),
        max_rounds=draw.options.get("max_rounds"),
        warm="prices" in draw.options,
    )
