"""Random colour jitter: brightness, contrast, saturation, hue, and conversion to greyscale.

After SimCLR (Chen et al., A simple framework for contrastive learning, 2020, section 3.1 and
appendix A): without it, the colours alone identify two views of one image. SimCLR draws the order
of the changes, rotates hues in HSV and clips values after each change. Here the order is fixed and
hues rotate at constant luma, so that all changes of an image are one affine map of its colours;
values are clipped once, at the end.
"""

import dataclasses

import numpy as np

from nat_jax.errors import InputError

# SimCLR's probability of jitter, and at strength 1 the largest changes of the brightness, contrast
# and saturation factors, and of the hue, in full circles.
_SHARE, _FACTOR, _HUE = 0.8, 0.8, 0.2
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
# Luma and two chroma axes, between which hue is the angle (NTSC's YIQ).
_TO_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclasses.dataclass(frozen=True)
class ColorJitter:
    """Strength of the jitter.

    Attributes:
        strength: SimCLR's s, 1 on ImageNet and 0.5 on CIFAR-10: the factors of brightness, contrast
            and saturation are in 1 +- 0.8 s, the hue rotates by up to 0.2 s of a circle. A fifth of
            the images are not jittered.
        grayscale: probability that an image becomes greyscale; 0.2 in SimCLR.
    """

    strength: float = 0.0
    grayscale: float = 0.0
    draws = 6  # random numbers for each image

    def __post_init__(self) -> None:
        for name, value in (("strength", self.strength), ("grayscale", self.grayscale)):
            if not 0 <= value <= 1:
                raise InputError(f"ColorJitter: expected a {name} in [0, 1], got {value}")

    def apply(self, images: np.ndarray, uniform: np.ndarray) -> None:
        """Change the colours of a stack of images, in place.

        Args:
            images: uint8 [b, height, width, 3], written to.
            uniform: float64 [b, draws], random numbers in [0, 1).
        """
        matrix, offset = self._maps(images.mean(axis=(1, 2)), uniform)
        maps = matrix.astype(np.float32).swapaxes(1, 2), (offset + 0.5).astype(np.float32)
        # One by one: a stack of photographs in float32 would be four times the batch.
        for image, turn, shift in zip(images, *maps, strict=True):
            pixels = image.astype(np.float32).reshape(-1, 3) @ turn
            pixels += shift  # plus 0.5, so that truncation rounds to the nearest integer
            image[:] = np.clip(pixels, 0, 255, out=pixels).reshape(image.shape)

    def _maps(self, mean: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the matrix of each image, float64 [b, 3, 3], and its offset, float64 [b].

        Contrast mixes an image with the mean of its luma after the change of brightness.
        """
        changed = uniform[:, 0] < _SHARE
        centred = np.where(changed[:, None], 2 * uniform[:, 1:5] - 1, 0) * self.strength
        bright, contrast, saturation = (1 + _FACTOR * centred[:, :3]).T
        angle = 2 * np.pi * _HUE * centred[:, 3]
        saturation = np.where(uniform[:, 5] < self.grayscale, 0, saturation)
        turn = np.zeros((len(uniform), 3, 3))
        turn[:, 0, 0] = 1
        turn[:, 1, 1] = turn[:, 2, 2] = saturation * np.cos(angle)
        turn[:, 2, 1] = saturation * np.sin(angle)
        turn[:, 1, 2] = -turn[:, 2, 1]
        matrix = (contrast * bright)[:, None, None] * (_FROM_YIQ @ turn @ _TO_YIQ)
        return matrix, (1 - contrast) * bright * (mean @ _LUMA)
