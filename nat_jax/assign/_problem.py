"""The problem: input checks and the conversion of costs to a standard form."""

import contextlib
from typing import Any, NamedTuple

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

# jax 0.7 has enable_x64 in jax.experimental alone, where 0.9 no longer has it. And what 0.7 traces
# under it inside a larger program is lowered without it, to invalid code.
_X64_ENDS_WITH_TRACING = not hasattr(jax, "enable_x64")
enable_x64 = (jax.experimental if _X64_ENDS_WITH_TRACING else jax).enable_x64

ROUNDOFF = 2.0**-24  # of float32
TINY = 2.0**-126  # the smallest normal float32; what is smaller may count as zero
EXACT_INTEGERS = 2.0**24  # float32 holds every integer up to here


def full_precision(cost: ArrayLike) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which float64 of the host is not narrowed to float32.

    A common offset of the costs would swallow their differences before it can be removed.

    Raises:
        TypeError: float64 inside ``jit``, with a JAX that cannot lower it there.
    """
    host = _on_host(cost)
    if host is None or host.dtype != np.float64:
        return contextlib.nullcontext()
    narrowed = jax.dtypes.canonicalize_dtype(host.dtype) != host.dtype
    if _X64_ENDS_WITH_TRACING and narrowed and _is_traced():
        raise TypeError(
            "a float64 array of NumPy cannot be a constant inside jit before jax 0.8; pass it as "
            "an argument of the jitted function, or convert it to float32"
        )
    return enable_x64(True)


def _is_traced() -> bool:
    """Return whether the current code is being traced into a program."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def _on_host(cost: ArrayLike) -> np.ndarray | None:
    """Return what was given as a NumPy array, None if any of it is JAX's."""
    if isinstance(cost, jax.Array):
        return None
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cost)):
        return None
    return np.asarray(cost)


def as_cost(cost: ArrayLike) -> jax.Array:
    """Return `cost` as an array of real numbers of rank two or more; raise if it is not."""
    host = _on_host(cost)
    if host is not None and host.dtype.kind not in "fiubV":  # V: the 16-bit floats of ml_dtypes
        raise TypeError(f"cost must hold real numbers, got dtype {host.dtype}")
    if host is not None and host.dtype == np.longdouble != np.float64:
        raise TypeError("cost must not be of dtype longdouble; convert it to float64")
    if host is not None and host.dtype.kind in "iu" and host.size:
        kept = jax.dtypes.canonicalize_dtype(host.dtype)
        if host.min() < np.iinfo(kept).min or host.max() > np.iinfo(kept).max:
            raise ValueError(
                f"cost holds integers beyond {kept}, which JAX narrows {host.dtype} to; "
                "set jax_enable_x64 or pass floats"
            )
    array = cost if isinstance(cost, jax.Array) else jnp.asarray(cost)
    if array.dtype.kind not in "fiub" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"cost must hold real numbers, got dtype {array.dtype}")
    if array.ndim < 2:
        raise ValueError(
            f"cost must have shape [..., n, m], got {array.shape}; reshape one row to [1, m]"
        )
    return array


class Standard(NamedTuple):
    """A problem to minimise; the given costs are, up to a constant, ``cost * unit``."""

    cost: jax.Array  # float32[n, m]; +inf: forbidden; offset and size removed
    unit: jax.Array  # float32, a power of two
    largest: jax.Array  # float32, of the finite absolute values of `cost`
    dense: jax.Array  # bool; if true, no pair is forbidden
    nonfinite: jax.Array  # bool
    entry_error: jax.Array  # float32, by how much `cost` may miss the given value
    integral: jax.Array  # bool, all costs are integers (of any dtype) and exact


def standardise(cost: jax.Array, maximize: bool) -> Standard:
    """Bring [n, m] costs of any real type to the standard form."""
    if jnp.issubdtype(cost.dtype, jnp.floating):
        return _standardise_floats(cost, maximize)
    if cost.dtype == jnp.bool_:
        cost = cost.astype(jnp.uint8)
    # Differences of integers always fit the unsigned type of the same width.
    unsigned = jnp.dtype(f"uint{8 * cost.dtype.itemsize}")
    whole = cost.astype(unsigned)
    low, high = jnp.min(cost).astype(unsigned), jnp.max(cost).astype(unsigned)
    shifted = (high - whole if maximize else whole - low).astype(jnp.float32)
    span = (high - low).astype(jnp.float32)
    unit = _power_above(span)
    exact = jnp.bool_(True)
    if unsigned.itemsize > 2:
        exact = high - low <= jnp.asarray(EXACT_INTEGERS, unsigned)
    return Standard(
        cost=shifted / unit,
        unit=unit,
        largest=span / unit,
        dense=jnp.bool_(True),
        nonfinite=jnp.bool_(False),
        entry_error=jnp.where(exact, 0, jnp.float32(ROUNDOFF)),
        integral=exact,
    )


def _power_above(size: jax.Array) -> jax.Array:
    """Return the power of two just above `size`, 1 for 0, within what float32 can divide by."""
    exponent = jnp.clip(jnp.frexp(size)[1], -125, 126)
    return jnp.ldexp(jnp.ones((), size.dtype), jnp.where(size > 0, exponent, 0))


def _standardise_floats(cost: jax.Array, maximize: bool) -> Standard:
    # A pass over the costs is what a small or easy problem takes longest for: each one counts.
    dtype = jnp.float64 if cost.dtype == jnp.float64 else jnp.float32
    cost = -cost.astype(dtype) if maximize else cost.astype(dtype)
    low, high = jnp.min(cost), jnp.max(cost)
    dense = jnp.isfinite(jnp.sum(cost))  # minima may pass over NaN, XLA:CPU's do
    low, high, bad = lax.cond(
        dense, lambda _: (low, high, jnp.bool_(False)), _range_of_finite, cost
    )
    # Where an offset is worth removing, x - offset is exact (Sterbenz); so is the scaling.
    offset = jnp.where((low > 0) & (high <= 2 * low), low, 0)
    offset = jnp.where((high < 0) & (low >= 2 * high), high, offset)
    largest = jnp.maximum(jnp.abs(low - offset), jnp.abs(high - offset))
    unit = _power_above(largest)
    bad |= largest > float(jnp.finfo(jnp.float32).max)  # of float64
    known = jnp.where(jnp.isnan(cost) | (cost == -jnp.inf), high, cost)
    return Standard(
        cost=((known - offset) / unit).astype(jnp.float32),
        unit=unit.astype(jnp.float32),
        largest=(largest / unit).astype(jnp.float32),
        dense=dense,
        nonfinite=bad,
        entry_error=jnp.float32(8 * TINY + (ROUNDOFF if dtype == jnp.float64 else 0)),
        integral=_all_integral(known, offset) & (largest <= EXACT_INTEGERS),
    )


def _range_of_finite(cost: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the smallest and largest finite value, 0 without any, and whether NaN or -inf is."""
    finite = jnp.isfinite(cost)
    some = jnp.any(finite)
    low = jnp.where(some, jnp.min(cost, initial=jnp.inf, where=finite), 0)
    high = jnp.where(some, jnp.max(cost, initial=-jnp.inf, where=finite), 0)
    return low, high, jnp.any(~finite & (cost != jnp.inf))


def _all_integral(cost: jax.Array, offset: jax.Array) -> jax.Array:
    """Whether ``cost - offset`` holds integers and infinities only; the first row mostly tells."""

    def whole(some: jax.Array) -> jax.Array:
        return jnp.all(some - offset == jnp.floor(some - offset))

    def all_integral(cost: jax.Array) -> jax.Array:
        # Arithmetic takes subnormal numbers for zero; their bits are not.
        bits = lax.bitcast_convert_type(cost, f"uint{8 * cost.dtype.itemsize}") << 1
        tiny = lax.bitcast_convert_type(jnp.finfo(cost.dtype).tiny, bits.dtype) << 1
        return whole(cost) & ~jnp.any((bits > 0) & (bits < tiny))

    return lax.cond(whole(cost[0]), all_integral, lambda _: jnp.bool_(False), cost)
