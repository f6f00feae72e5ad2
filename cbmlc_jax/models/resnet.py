"""ResNet (He et al. 2016), as torchvision has it, with global maximum pooling.

The stride of a bottleneck is in its 3 x 3 convolution.  Stages: the stem, layer1 to
layer4, the pooling: [B, H, W, 3] -> [B, 512] (18, 34) or [B, 2048] (50, 101).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from cbmlc_jax.models.backbone import Backbone, Norm, conv

# Blocks of layer1..layer4.
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class ResNet(Backbone):
    """See the module's docstring; `size` is 18, 34, 50 or 101."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each stage."""
        grown = 1 if self.size < 50 else 4
        return (64, *(64 * 2**i * grown for i in range(4)), 512 * grown)

    def stages(self):
        """(names of its modules, function of (x, train)) of each stage."""

        def stem(x, train):
            x = conv(64, 7, 2, name="conv1")(x)
            x = nn.relu(Norm(name="bn1")(x, train))
            return nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])

        def layer(number):
            def run(x, train):
                stride = 1 if number == 1 else 2
                depth, width = _BLOCKS[self.size][number - 1], 64 * 2 ** (number - 1)
                return Layer(
                    depth, width, stride, self.size >= 50, name=f"layer{number}"
                )(x, train)

            return (f"layer{number}",), run

        def pool(x, train):
            return jnp.max(x, axis=(1, 2))

        return [
            (("conv1", "bn1"), stem),
            *(layer(number) for number in (1, 2, 3, 4)),
            ((), pool),
        ]

    def normalised(self, images):
        """Pixels in [0, 1], less ImageNet's mean, over its deviation."""
        mean, deviation = (
            jnp.array(v).reshape(1, 1, 1, 3) for v in (_MEAN, _DEVIATION)
        )
        return (images / 255 - mean) / deviation


class Layer(nn.Module):
    """`depth` blocks, of which the first has the stride."""

    depth: int
    width: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x, train: bool):
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            x = Block(self.width, stride, self.bottleneck, name=str(i))(x, train)
        return x


class Block(nn.Module):
    """x' = relu(f(x) + shortcut(x)), f of two or, as a bottleneck, of three layers."""

    width: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x, train: bool):
        if self.bottleneck:
            shapes = [(1, 1, 1), (3, self.stride, 1), (1, 1, 4)]
        else:
            shapes = [(3, self.stride, 1), (3, 1, 1)]
        y, shortcut = x, x
        for i, (kernel, stride, grown) in enumerate(shapes, 1):
            y = conv(self.width * grown, kernel, stride, name=f"conv{i}")(y)
            y = Norm(name=f"bn{i}")(y, train)
            y = nn.relu(y) if i < len(shapes) else y
        if y.shape != x.shape:
            shortcut = Downsample(y.shape[-1], self.stride, name="downsample")(x, train)
        return nn.relu(y + shortcut)


class Downsample(nn.Module):
    """A shortcut to another width or size: 1 x 1 convolution and normalisation."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x, train: bool):
        return Norm(name="1")(conv(self.width, 1, self.stride, name="0")(x), train)
