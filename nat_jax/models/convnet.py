"""A small network of 3x3 convolutions for images of 8 to 64 pixels (beyond the paper)."""

from nat_jax.errors import InputError
from nat_jax.models.layers import Conv, Dense, Spec


def convnet(
    *,
    widths: tuple[int, ...] = (32, 64, 128, 256),
    pools: int = 3,
    fc_width: int = 0,
    dropout: float = 0.0,
) -> Spec:
    """Return a stack of 3x3 blocks, the first ``pools`` of which halve the side.

    Args:
        widths: output channels of each block.
        pools: number of blocks followed by 2x2 max-pooling.
        fc_width: width of one fully connected block before the features; 0 for none.
        dropout: dropout rate after that block.

    Raises:
        ValueError: more pools than blocks.
    """
    if not 0 <= pools <= len(widths):
        raise InputError(
            f"model.options.pools: expected 0 to {len(widths)}, the number of widths; got {pools}"
        )
    convs = tuple(
        Conv(width, kernel=3, pad=1, pool=(2, 2) if i < pools else None)
        for i, width in enumerate(widths)
    )
    denses = (Dense(fc_width, dropout=dropout),) if fc_width else ()
    return Spec(convs=convs, denses=denses)
