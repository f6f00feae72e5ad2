"""ML-GCN: label classifiers made by graph convolutions over label vectors.

Chen, Wei, Wang and Guo, "Multi-Label Image Recognition with Graph Convolutional
Networks", CVPR 2019, with the details of the authors' code
(github.com/megvii-research/ML-GCN).

    C = A leaky(A E W1) W2,  logits = pool(encoder(x)) C^T

Shapes: B rows, S positions of the memory, d its width, L labels, P width of the label
vectors E, D width of the classifiers C, A [L, L].
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8, UInt32

from cbmlc_jax.models.outputs import Outputs

_SLOPE = 0.2  # of LeakyReLU below 0


def correlation_adjacency(
    labels: UInt8[np.ndarray, "rows labels"],
    threshold: float = 0.4,
    weight: float = 0.25,
) -> Float[np.ndarray, "labels labels"]:
    """The graph of label correlations, normalised; the code's gen_A, then gen_adj.

        P_ij = count_ij / count_i for i != j, 0 for i = j     probability of j given i
        M_ij = [P_ij >= threshold and P_ij > 0]
        A = weight M_ij / (sum_k M_kj + 1e-6) + [i = j]       sums over columns
        result = D A^T D, D = diag(sum_j A_ij)^(-1/2)         sums over rows

    The result is transposed against A and not symmetric: label j receives from those
    labels i that imply j, whose weights in A add up to `weight`.  (The counts that the
    code ships have zeros on the diagonal, hence P_ii = 0.)  A label without positives
    is connected to itself alone.

    Args:
        labels: [N, L] training labels.
        threshold: t of the paper.
        weight: p of the paper; .25 in the code, for which the label itself keeps 1.

    Returns:
        float32 [L, L].
    """
    # float64 counts: float32 is exact only to 2^24 rows.
    present = np.asarray(labels, np.float64)
    counts = present.T @ present
    positives = np.diag(counts).copy()
    np.fill_diagonal(counts, 0)
    given = counts / np.maximum(positives, 1)[:, None]
    # At threshold 0, too, what never occurs together is not connected.
    implies = (given >= threshold) & (counts > 0)
    adjacency = implies * weight / (implies.sum(0, keepdims=True) + 1e-6)
    adjacency += np.identity(len(adjacency))
    scale = adjacency.sum(1) ** -0.5
    return (scale[:, None] * adjacency.T * scale[None]).astype(np.float32)


def masked_max(
    memory: Float[Array, "batch positions width"], valid: Bool[Array, "batch positions"]
) -> Float[Array, "batch width"]:
    """The maximum over the valid positions; 0 in rows that have none."""
    lowest = jnp.finfo(memory.dtype).min
    highest = jnp.max(jnp.where(valid[..., None], memory, lowest), axis=1)
    return jnp.where(valid.any(1, keepdims=True), highest, 0)


def _by_width_out(key, shape, dtype=jnp.float32):
    """U(-1/sqrt(width out), 1/sqrt(width out)), as the code's graph convolution."""
    bound = shape[1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class MLGCN(nn.Module):
    """See the module's docstring.  No biases, as in the code.

    Attributes:
        encoder: (inputs, rows) -> memory [B, S, d], valid [B, S].
        label_vectors: float32 [L, P]; constants, not trained.
        hidden: width between the convolutions.
        width: D.  The paper's is that of its ResNet; with d != D a linear map (Glorot
            uniform) comes between pooling and classifiers.
    """

    encoder: nn.Module
    label_vectors: np.ndarray
    hidden: int = 1024
    width: int = 2048

    @nn.compact
    def __call__(
        self,
        inputs: dict[str, Array],
        graph: Float[Array, "labels labels"] | None = None,
        rows: UInt32[Array, " batch"] | None = None,
        labels: UInt8[Array, "batch labels"] | None = None,
    ) -> Outputs:
        """Scores the labels of a batch.

        Args:
            inputs: what the encoder reads, see `encoders`.
            graph: [L, L], A as `correlation_adjacency` makes it, not trained; None is
                the identity.
            rows: [B] row numbers of the global batch for dropout; None for none.
            labels: not read; the loss is that of config.loss (published: bce).
        """
        memory, valid = self.encoder(inputs, rows)
        pooled = masked_max(memory, valid)
        if pooled.shape[-1] != self.width:
            glorot = nn.initializers.glorot_uniform()
            shape = (pooled.shape[-1], self.width)
            pooled = pooled @ self.param("pooled_map", glorot, shape)

        def convolve(nodes, name, width):
            kernel = self.param(name, _by_width_out, (nodes.shape[1], width))
            nodes = nodes @ kernel
            return nodes if graph is None else jnp.asarray(graph, nodes.dtype) @ nodes

        # Among the parameters, so that a checkpoint holds them; never trained.
        vectors = self.param("label_vectors", lambda _: jnp.asarray(self.label_vectors))
        nodes = jax.lax.stop_gradient(vectors).astype(pooled.dtype)
        nodes = jax.nn.leaky_relu(convolve(nodes, "convolution_0", self.hidden), _SLOPE)
        classifiers = convolve(nodes, "convolution_1", self.width)
        return Outputs(pooled @ classifiers.T)
