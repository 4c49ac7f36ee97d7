"""Programs beside the train step, compiled for TPU pods that are not there: they must compile.

Part of a pod is another machine to the compiler than the whole of it. Needs libtpu (the extra
``tpu``), which compiles without a TPU; see benchmarks/scale.py for the step itself.
"""

import importlib.util
import json

import pytest
from project import python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu"
    ),
]

PODS = ("v5e:4x4", "v5e:16x16", "v6e:4x4", "v5p:4x4x4")

# Compiles for the pod named by the argument; prints, as JSON, what each program says.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from nat_jax import models
from nat_jax.runtime import sharding
from nat_jax.training import assignment_state
from nat_jax.models.frozen import compiled_layer_outputs

devices = list(topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices)
processes = 1 + max(device.process_index for device in devices)
said = {}

def attempt(name, compile_it):
    try:
        compile_it()
        said[name] = "ok"
    except Exception as error:
        said[name] = str(error)[-300:]

def judging(devices):
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    network = models.make_model(
        "convnet", dim=6, image_size=8, frontend="sobel", platform="tpu", widths=(4,), pools=1
    )
    everywhere = NamedSharding(mesh, P())
    weights = sharding.abstract(jax.eval_shape(network.init, jax.random.key(0)), everywhere)
    images = jax.ShapeDtypeStruct(
        (64, 8, 8, 3), jnp.uint8, sharding=NamedSharding(mesh, P("data"))
    )
    outputs = compiled_layer_outputs("tpu")
    outputs.lower(network, ("conv1", "z"), None, *weights, images).compile()

here = [device for device in devices if device.process_index == 0]
attempt("judging alone", lambda: judging(sharding.standalone_devices(here, processes)))
attempt("judging on all of a host", lambda: judging(here))

def summing(first_only):
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(ordered).reshape(processes, -1)
    grid = grid[:, :1] if first_only else grid
    mesh = Mesh(grid, ("process", "local"), axis_types=(AxisType.Auto, AxisType.Auto))
    stacked = jax.ShapeDtypeStruct(
        (processes, 4096), jnp.uint8, sharding=NamedSharding(mesh, P("process"))
    )
    assignment_state._add_up.lower(stacked, NamedSharding(mesh, P())).compile()

attempt("sum over processes", lambda: summing(first_only=False))
attempt("sum on one device each", lambda: summing(first_only=True))
for model in (1, 2, 4):
    attempt(f"mesh of model {model}", lambda: sharding.make_mesh(-1, model, devices=devices))
print(json.dumps(said))
"""


@pytest.fixture(scope="module", params=PODS)
def said(request) -> dict[str, str]:
    variables = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = python("-c", PROGRAM, request.param, **variables)
    return {"pod": request.param, **json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "program", ["judging alone", "sum over processes", *(f"mesh of model {m}" for m in (1, 2, 4))]
)
def test_it_compiles(said, program):
    assert said[program] == "ok", said["pod"]


def test_the_simpler_ways_are_refused_somewhere(said):
    """Else the care that is taken could go."""
    if said["pod"] == "v5e:16x16":
        assert "limited ICI routing" in said["judging on all of a host"]
        assert said["sum on one device each"] != "ok"
