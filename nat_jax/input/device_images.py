"""Small data sets in device memory: images are gathered, shifted and flipped on the devices.

A batch then costs the transfer of a few numbers for each image. The result equals that of
`transforms.ShiftFlip.apply` on the host bit for bit.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nat_jax.input.reader import GREY
from nat_jax.runtime import sharding


class DeviceImages:
    """A copy of a data set's images on every device.

    Args:
        images: uint8 [N, size, size, 3].
        pad: width of the black border in which corners lie; see `transforms.Transform`.
        mesh: the devices.
    """

    def __init__(self, images: np.ndarray, pad: int, mesh: Mesh):
        everywhere = sharding.replicated(mesh)
        self._images = jax.make_array_from_process_local_data(everywhere, images, images.shape)
        spec = sharding.over_all(mesh).spec
        self._take = jax.jit(
            jax.shard_map(
                functools.partial(_take, pad),
                mesh=mesh,
                in_specs=(P(), spec, spec, spec, spec),
                out_specs=spec,
            )
        )

    def __call__(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return the images of a batch.

        Args:
            batch: index int32 [B], corner int32 [B, V, 2] and mirrored bool [B, V] as in
                `transforms.ShiftFlip`, weight float32 [B], all split along "data".

        Returns:
            uint8 [B, size, size, 3], or [B, V, size, size, 3] with several views, split over all
            devices; 128 where the weight is 0.
        """
        return self._take(
            self._images, batch["index"], batch["corner"], batch["mirrored"], batch["weight"]
        )


def _take(
    pad: int,
    images: jax.Array,
    index: jax.Array,
    corner: jax.Array,
    mirrored: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    size = images.shape[1]
    chosen = jnp.pad(images[index], ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def view(image: jax.Array, corner: jax.Array, mirrored: jax.Array) -> jax.Array:
        shifted = jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (size, size, 3))
        return jnp.where(mirrored, shifted[:, ::-1], shifted)

    views = jax.vmap(jax.vmap(view, in_axes=(None, 0, 0)))(chosen, corner, mirrored)
    views = jnp.where(weight[:, None, None, None, None] > 0, views, jnp.uint8(GREY))
    return views[:, 0] if views.shape[1] == 1 else views
