"""What the image networks share: stages, cuts, frozen stages, batch normalisation.

A network is a list of stages, 0 the stem and the last one the pooling.  It can start at
a cut, on the features that the stages before made, and leave the first ones frozen.
Parameters carry the names of the PyTorch modules whose weights they take.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


class Backbone(nn.Module):
    """See the module's docstring.

    Attributes:
        size: which network of its family.
        start: the first stage that is built; the input is what stage start - 1 makes.
        frozen: stages below run as in evaluation, and no gradient reaches them.
    """

    size: int
    start: int = 0
    frozen: int = 0

    @property
    def num_stages(self) -> int:
        """Number of stages, the pooling among them."""
        return len(self.stages())

    @property
    def frozen_modules(self) -> tuple[str, ...]:
        """Names of the modules of the frozen stages."""
        names = (names for names, _ in self.stages()[: self.frozen])
        return tuple(name for some in names for name in some)

    def stages(self) -> list[tuple[tuple[str, ...], Callable]]:
        """(names of its modules, function of (x, train)) of each stage."""
        raise NotImplementedError

    def normalised(self, images: Array) -> Array:
        """Pixels 0..255 as the network was trained on them."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x: UInt8[Array, "batch height width 3"] | Float[Array, "batch ..."],
        *,
        train: bool = False,
        stop: int | None = None,
    ) -> Float[Array, "batch ..."]:
        """Runs the stages start..stop - 1.

        Args:
            x: images of pixels 0..255 where start is 0, else the output of stage
                start - 1.
            train: normalise by the statistics of the batch, and update the running
                averages, in the stages that are not frozen.
            stop: None for all stages: the result is the pooled [B, C].
        """
        if self.start == 0:
            x = self.normalised(x.astype(jnp.float32))
        for number, (_, stage) in enumerate(self.stages()[:stop]):
            if number < self.start:
                continue
            x = stage(x, train and number >= self.frozen)
            if number == self.frozen - 1:
                x = jax.lax.stop_gradient(x)
        return x


class Norm(nn.Module):
    """Batch normalisation over batch and space.

    The running variance is that of the batch as it is (biased), where PyTorch's is
    multiplied by n / (n - 1); n is B H W.

    Attributes:
        epsilon: added to the variance.
        momentum: of the running averages: new = momentum old + (1 - momentum) batch.
    """

    epsilon: float = 1e-5
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """x: [B, H, W, C]; train: use and record the statistics of the batch."""
        shape = (x.shape[-1],)
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        scale = self.param("scale", ones, shape)
        bias = self.param("bias", zeros, shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        of_mean, of_var = mean.value, var.value
        if train:
            of_mean, of_var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
            if not self.is_initializing():
                for kept, batch in ((mean, of_mean), (var, of_var)):
                    old = self.momentum * kept.value
                    kept.value = old + (1 - self.momentum) * batch
        factor = scale * jax.lax.rsqrt(of_var + self.epsilon)
        factor, shift = (
            v.reshape(1, 1, 1, -1) for v in (factor, bias - of_mean * factor)
        )
        return x * factor + shift


class Depthwise(nn.Module):
    """A convolution of each channel by itself, without bias, padded as SAME.

        y[h, w, c] = sum_ij x[s h + i, s w + j, c] kernel[i, j, 0, c]

    Written as that sum over kernel^2 shifted arrays: XLA's grouped convolution takes
    many times as long on a CPU.

    Attributes:
        kernel: size of the square.
        stride: s.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x: [B, H, W, C]."""
        size, stride = self.kernel, self.stride
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel = self.param("kernel", init, (size, size, 1, x.shape[-1]))
        # Of the places of the result, the last one's window ends the padded input.
        spans = [(-(-n // stride) - 1) * stride + 1 for n in x.shape[1:3]]
        room = [
            max(span + size - 1 - n, 0)
            for span, n in zip(spans, x.shape[1:3], strict=True)
        ]
        x = jnp.pad(x, ((0, 0), *((r // 2, r - r // 2) for r in room), (0, 0)))
        result = 0.0
        for i in range(size):
            for j in range(size):
                part = x[:, i : i + spans[0] : stride, j : j + spans[1] : stride]
                result += part * kernel[i, j].reshape(1, 1, 1, -1)
        return result


def conv(
    width: int,
    kernel: int,
    stride: int,
    padding: str | None = None,
    *,
    name: str,
) -> nn.Conv:
    """A square convolution without bias; padding None is kernel // 2 on every side.

    Kernels start at N(0, 2 / (kernel^2 width)), as torchvision's.
    """
    return nn.Conv(
        width,
        (kernel, kernel),
        (stride, stride),
        padding=padding or [(kernel // 2, kernel // 2)] * 2,
        use_bias=False,
        kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        name=name,
    )
