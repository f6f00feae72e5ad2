"""EfficientNet-Lite (TensorFlow, 2020): MBConv blocks without squeeze-and-excitation.

ReLU6, padding as TensorFlow's SAME, batch normalisation with epsilon 1e-3.  Stages: the
stem, seven groups of blocks, the head with global average pooling:
[B, H, W, 3] -> [B, 1280].  Stem and head keep their widths, and the first and the last
group their depth, whatever the variant.  Without drop connect.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp

from cbmlc_jax.models.backbone import Backbone, Depthwise, Norm, conv

# Kernel, stride, expansion, channels, repeats of EfficientNet-B0's groups.
_GROUPS = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# Variant -> factors on width and depth.
_SCALE = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2)}


def _channels(width: int, factor: float) -> int:
    """The multiple of 8 next to width * factor, not below 90 % of it."""
    wanted = width * factor
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


class EfficientNetLite(Backbone):
    """See the module's docstring; `size` is 0, 1 or 2."""

    def stages(self):
        """(names of its modules, function of (x, train)) of each stage."""

        def stem(x, train):
            x = conv(32, 3, 2, "SAME", name="_conv_stem")(x)
            return nn.relu6(_norm("_bn0")(x, train))

        def head(x, train):
            x = conv(1280, 1, 1, name="_conv_head")(x)
            x = nn.relu6(_norm("_bn1")(x, train))
            return jnp.mean(x, axis=(1, 2))

        stages, first = [(("_conv_stem", "_bn0"), stem)], 0
        width_factor, depth_factor = _SCALE[self.size]
        for number, (kernel, stride, expansion, width, repeats) in enumerate(_GROUPS):
            if 0 < number < len(_GROUPS) - 1:
                repeats = math.ceil(repeats * depth_factor)
            settings = kernel, stride, expansion, _channels(width, width_factor)
            stages.append(self._group(range(first, first + repeats), *settings))
            first += repeats
        return [*stages, (("_conv_head", "_bn1"), head)]

    def _group(self, numbers, kernel, stride, expansion, width):
        names = tuple(f"_blocks_{number}" for number in numbers)

        def run(x, train):
            for i, name in enumerate(names):
                step = stride if i == 0 else 1
                x = MBConv(kernel, step, expansion, width, name=name)(x, train)
            return x

        return names, run

    def normalised(self, images):
        """(x - 127) / 128."""
        return (images - 127) / 128


class MBConv(nn.Module):
    """Expansion (1 x 1), depthwise convolution, projection (1 x 1); plus the input
    where the shapes agree."""

    kernel: int
    stride: int
    expansion: int
    width: int

    @nn.compact
    def __call__(self, x, train: bool):
        inner, y = x.shape[-1] * self.expansion, x
        if self.expansion != 1:
            y = conv(inner, 1, 1, name="_expand_conv")(y)
            y = nn.relu6(_norm("_bn0")(y, train))
        y = Depthwise(self.kernel, self.stride, name="_depthwise_conv")(y)
        y = nn.relu6(_norm("_bn1")(y, train))
        y = conv(self.width, 1, 1, name="_project_conv")(y)
        y = _norm("_bn2")(y, train)
        return x + y if x.shape == y.shape else y


def _norm(name: str) -> Norm:
    return Norm(epsilon=1e-3, momentum=0.99, name=name)
