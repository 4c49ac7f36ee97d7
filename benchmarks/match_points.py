"""Value against time of matching points, compared with blocks and with an exact solver.

    python benchmarks/match_points.py --sizes 2048 --families uniform
    python benchmarks/match_points.py --output docs/results/match_points.json \
        --plot docs/images/match_points.png

The families: `uniform` on the sphere, `clustered` (20 clusters) and `collapsed` (near one
direction) features, each matched to uniform points by cosine. The rivals: one pass of random blocks
of 1024, solved exactly by `nat_jax.assign.auction`, and lapx's lapjvr on the matrix up to
``--exact`` points, if it is installed. Everything runs in one process on one core with one thread.
Reported is the processor time of one call, without compilation; for `match_points` the certificate
is included.

The value is the share of the gain over a random matching: of that of the exact solver, or without
it, of the largest gain that the certificate of the largest budget allows. If a certificate is
violated by the exact solver, the exit status is 1.

Sizes above ``--certify`` run once, with compilation and without certificate, and the value is the
share of the gain of the largest budget:

    python benchmarks/match_points.py --sizes 1000000 --families uniform --dimension 64 \
        --budgets 1,3 --output docs/results/match_points_large.json
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
from assign import use_one_core
from measure import words

if TYPE_CHECKING:
    import numpy as np

Row = dict[str, Any]

FAMILIES = ("uniform", "clustered", "collapsed")
PACKAGES = ("nat_jax", "jax", "numpy", "lapx")
_BLOCK = 1024


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=words, default=words("8192,16384,50000"))
    parser.add_argument("--families", type=words, default=list(FAMILIES))
    parser.add_argument("--dimension", type=int, default=32)
    parser.add_argument("--budgets", type=words, default=words("1,2,3"))
    parser.add_argument("--exact", type=int, default=16384, help="largest size for lapjvr")
    parser.add_argument(
        "--certify", type=int, default=65536, help="largest size with certificates and repetition"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON; the table goes to a .md file next to it")
    parser.add_argument("--plot", type=Path, help="PNG")
    arguments = parser.parse_args()
    if unknown := sorted({*arguments.families} - {*FAMILIES}):
        parser.error(f"unknown families {', '.join(unknown)}; known: {', '.join(FAMILIES)}")
    return arguments


def points(family: str, n: int, dimension: int, seed: int) -> "tuple[np.ndarray, np.ndarray]":
    """Return features of a family and uniform points, float32[n, dimension] of norm 1."""
    import numpy as np

    random = np.random.default_rng([seed, n])

    def unit(points: np.ndarray) -> np.ndarray:
        return (points / np.linalg.norm(points, axis=-1, keepdims=True)).astype(np.float32)

    noise = random.standard_normal((n, dimension)) / dimension**0.5
    targets = unit(random.standard_normal((n, dimension)))
    if family == "uniform":
        return unit(noise), targets
    centres = unit(random.standard_normal((20 if family == "clustered" else 1, dimension)))
    spread = 0.5 if family == "clustered" else 0.1
    return unit(centres[random.integers(len(centres), size=n)] + spread * noise), targets


def blocks(x: "np.ndarray", y: "np.ndarray") -> "np.ndarray":
    """Match blocks in the order given, each exactly; what does not fill a block stays."""
    import numpy as np

    from nat_jax.assign import auction

    col4row = np.arange(len(x))
    for begin in range(0, len(x) - _BLOCK + 1, _BLOCK):
        part = slice(begin, begin + _BLOCK)
        col4row[part] = begin + np.asarray(auction(-x[part] @ y[part].T).col4row)
    return col4row


def exact(x: "np.ndarray", y: "np.ndarray") -> "np.ndarray":
    """Match with lapjvr."""
    import lap
    import numpy as np

    return np.asarray(lap.lapjvr(-(x @ y.T), return_cost=False)[1])


def run(family: str, n: int, options: argparse.Namespace) -> list[Row]:
    """Return a row for each solver and budget."""
    import numpy as np

    from nat_jax.assign import match_points

    x, y = points(family, n, options.dimension, options.seed)
    random = float(x.mean(axis=0, dtype=float) @ y.mean(axis=0, dtype=float))

    def row(solver: str, col4row: "np.ndarray", times: dict[str, float], **more: Any) -> Row:
        assert len(np.unique(col4row)) == n
        cosine = float(np.einsum("nd,nd->n", x, y[col4row], dtype=float).mean())
        found = {"family": family, "n": n, "solver": solver, "cosine": cosine}
        found |= {"random": random, "peak_bytes": peak_bytes(), **more}
        measure.log(f"{found} {times}")
        return found | {name: measure.short(value) for name, value in times.items()}

    if n >= _BLOCK:
        blocks(x[:_BLOCK], y[:_BLOCK])  # compiles
    rows = [row("blocks", *measure.timed(lambda: blocks(x, y)))]
    # The first call compiles, and a second costs little beside it.
    for budget in map(int, options.budgets):

        def match(budget: int = budget) -> Any:
            return match_points(x, y, budget=budget, certify=n <= options.certify)

        first, with_compilation = measure.timed(match)
        if n > options.certify:
            rows.append(
                row("match_points", np.asarray(first.col4row), with_compilation, budget=budget)
            )
            continue
        again, times = measure.timed(match)
        assert np.array_equal(first.col4row, again.col4row)
        times["first_call_cpu"] = with_compilation["cpu"]
        bound = 1 - again.cost + again.gap
        more = {"budget": budget, "bound": bound}
        rows.append(row("match_points", np.asarray(again.col4row), times, **more))
    if n <= options.exact:
        try:
            rows.append(row("lapjvr", *measure.timed(lambda: exact(x, y))))
        except ModuleNotFoundError:
            measure.log("lapx is not installed")
    known = [found["cosine"] for found in rows if found["solver"] == "lapjvr"]
    bounds = [found["bound"] for found in rows if "bound" in found]
    best = known[0] if known else min(bounds, default=max(found["cosine"] for found in rows))
    for found in rows:
        found["share"] = (found["cosine"] - random) / (best - random)
        if "bound" in found:
            found["certified"] = (found["cosine"] - random) / (found["bound"] - random)
    return rows


def peak_bytes() -> int:
    """Return this process's peak memory so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(results: Row) -> str:
    """Return the results as a page of Markdown."""
    lines = [
        [
            f"{row['n']:,}, {row['family']}",
            row["solver"] + (f", budget {row['budget']}" if "budget" in row else ""),
            measure.number(row["cpu"]),
            f"{100 * row['share']:.3f}",
            f"{100 * row['certified']:.3f}" if "certified" in row else "",
        ]
        for row in results["rows"]
    ]
    exact = any(row["solver"] == "lapjvr" for row in results["rows"])
    note = ", with lapjvr's matrices" if exact else ""
    if any("certified" not in row for row in results["rows"] if "budget" in row):
        note += "; without certificate, the gain is that of the largest budget, and times include "
        note += "compilation"
    head = ["points", "solver", "CPU seconds", "% of the gain", "% certified"]
    return (
        f"# Matching points\n\n{measure.described(results, *PACKAGES)}; D = "
        f"{results['dimension']}, seed {results['seed']}; peak memory of the process "
        f"{measure.size(results['peak_bytes'])}{note}.\n\n"
    ) + measure.table(head, lines)


def plot(rows: Iterable[Row], path: Path) -> None:
    """Draw what is missing to the best known gain, against time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(rows)
    sizes = list(dict.fromkeys(row["n"] for row in rows))
    figure, axes = plt.subplots(
        1,
        len(sizes),
        figsize=(4 * len(sizes), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, n in zip(axes[0], sizes, strict=True):
        for number, family in enumerate(dict.fromkeys(row["family"] for row in rows)):
            some = [row for row in rows if (row["n"], row["family"]) == (n, family)]
            mine = [row for row in some if row["solver"] == "match_points"]
            curve = [(row["cpu"], max(100 - 100 * row["share"], 1e-4)) for row in mine]
            axis.plot(*zip(*curve, strict=True), "o-", color=f"C{number}", label=family)
            for row in some:
                if row["solver"] == "blocks":
                    axis.plot(row["cpu"], 100 - 100 * row["share"], "s", color=f"C{number}")
                if row["solver"] == "lapjvr":
                    axis.axvline(row["cpu"], color=f"C{number}", linestyle=":")
        axis.set(xscale="log", yscale="log", title=f"n = {n:,}", xlabel="CPU seconds")
    axes[0][0].set_ylabel("% of the gain missing")
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run what the options ask for."""
    options = parse()
    use_one_core()
    rows = [
        row
        for n in map(int, options.sizes)
        for family in options.families
        for row in run(family, n, options)
    ]
    results = {
        **measure.environment(*PACKAGES),
        "dimension": options.dimension,
        "seed": options.seed,
        "peak_bytes": peak_bytes(),
        "rows": rows,
    }
    text = table(results)
    print(text)
    measure.write(options.output, results, text)
    if options.plot:
        plot(rows, options.plot)
    best = {(row["n"], row["family"]): row for row in rows if row["solver"] == "lapjvr"}
    measure.finish(
        [
            f"the certificate of {row} is below {best[row['n'], row['family']]['cosine']}"
            for row in rows
            if "bound" in row
            and (row["n"], row["family"]) in best
            and row["bound"] < best[row["n"], row["family"]]["cosine"] - 1e-9
        ]
    )


if __name__ == "__main__":
    main()
