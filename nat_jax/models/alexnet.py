"""AlexNet with batch norm, as in the paper (section 4) and the authors' alexnet-specs.lua."""

from nat_jax.models.layers import Conv, Dense, Spec


def alexnet(*, dropout: float = 0.5, fc_width: int = 4096) -> Spec:
    """Return the authors' network: no groups, no local response normalisation, one dropout.

    224 -> 55 -> 27 -> 13 -> 13 -> 13 -> 6 pixels; 256 * 6 * 6 = 9,216 values enter fc6.
    """
    return Spec(
        convs=(
            Conv(96, kernel=11, stride=4, pad=2, pool=(3, 2)),
            Conv(256, kernel=5, pad=2, pool=(3, 2)),
            Conv(384, kernel=3, pad=1),
            Conv(384, kernel=3, pad=1),
            Conv(256, kernel=3, pad=1, pool=(3, 2)),
        ),
        denses=(Dense(fc_width, dropout=dropout), Dense(fc_width)),
        torch_init=True,
    )
