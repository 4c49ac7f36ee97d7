"""Check that what a step exchanges and holds does not grow with the pod or the data set.

    python benchmarks/scale.py collectives --output docs/results/collectives.json
    python benchmarks/scale.py billion --output docs/results/billion.json

``collectives`` compiles the ImageNet step for 8 and 512 simulated CPU devices, for TPUs v5e:2x4 and
v5e:16x16 (`pip install libtpu`) and for 2 x 8 H200s (`pip install 'jax[cuda12]'`); targets without
their compiler are skipped, with a line. Each is compiled in a process of its own; ``--targets``
names some of them, and the rows of others that the output already has stay in it. ``--tiny`` takes
a tiny network, in a minute. The exit status is 1 if a step exchanges what it should not: gradients
more or less than once, more sums over channels than batch norm needs, features or rows when it does
not match, anything as large as the data set, anything unknown, anything in a loop.

``billion`` runs train steps on a billion images, over 8 simulated devices of this machine. The
images are noise and the network is tiny, but everything that grows with the data set is real: the
permutation, and a checkpoint of it (4 bytes an image, written to ``--scratch`` and removed). With
smaller ``--records`` it does the same in seconds; several are run one after the other. The exit
status is 1 if an array in a compiled step is larger than a device's share of the permutation, if
the images that were touched do not own the same rows among them as before, if the result or a
restored checkpoint is another permutation or none, or if the process needed 14 GB or more.
"""

import argparse
import json
import os
from pathlib import Path

import measure


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("collectives", "billion"))
    parser.add_argument("--targets", nargs="+", help="of collectives: cpu:8, tpu:v5e:2x4, ...")
    parser.add_argument("--tiny", action="store_true", help="of collectives: a tiny network")
    parser.add_argument("--records", type=int, nargs="+", default=[10**7, 10**8, 10**9])
    parser.add_argument("--steps", type=int, default=40, help="of billion")
    parser.add_argument("--scratch", type=Path, help="of billion: the folder of checkpoints")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run a part and show what was found."""
    options = parse()
    if options.part == "billion":
        devices = 8
        # Before jax starts: it reads these once. Fewer threads than devices may deadlock.
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["NPROC"] = str(2 * devices)
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        import billion

        rows = []
        for records in sorted(options.records):  # the peak of memory is that of the process
            rows.append(billion.examine(records, options.steps, options.scratch))
            billion.show(rows[-1])
        faults = [f"{row['records']:,} images: {f}" for row in rows for f in row["faults"]]
        text = ""
    else:
        import collectives

        if options.child:
            collectives.child(options.child, tiny=options.tiny)
            return
        chosen = options.targets or list(collectives.TARGETS)
        if unknown := sorted(set(chosen) - set(collectives.TARGETS)):
            raise SystemExit(f"unknown targets {unknown}; known: {list(collectives.TARGETS)}")
        there = options.output and options.output.exists()
        before = json.loads(options.output.read_text())["rows"] if there else []
        rows, faults = collectives.run(chosen, before, tiny=options.tiny)
        text = collectives.page(rows)
    packages = ("jax", "jaxlib", "jax-cuda12-plugin", "libtpu")
    result = {"benchmark": options.part, **measure.environment(*packages), "rows": rows}
    measure.write(options.output, result, text)
    measure.finish(faults)


if __name__ == "__main__":
    main()
