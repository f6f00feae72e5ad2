"""The label-graph decoder: label nodes read the input, then each other."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Bool, DTypeLike, Float, UInt32

from cbmlc_jax.models import ops
from cbmlc_jax.models.layers import LayerNorm, MessageBlock
from cbmlc_jax.models.neighbours import Neighbours


class LabelGraphDecoder(nn.Module):
    """T blocks of input-to-label and label-to-label messages (paper section 4.2).

    Attributes:
        num_labels: L.
        embedding_width: P, of the label embeddings e_l.
        width: d; where P != d a bias-free linear map P -> d follows e.
        num_blocks: T; every block updates each node twice.
        num_heads, ffn_width, dropout: as `MessageBlock`.
        embedding_init: (key, [L, P]) -> initial e, the word vectors of the labels.
        dtype: of the operands of matrix products or None, see `ops`.
    """

    num_labels: int
    embedding_width: int
    width: int
    num_blocks: int
    num_heads: int
    ffn_width: int
    dropout: float = 0.0
    embedding_init: Callable = nn.initializers.normal(1.0)
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        memory: Float[Array, "batch tokens width"] | None,
        valid: Bool[Array, "batch tokens"] | None,
        graph: Bool[Array, "labels labels"] | Neighbours | None = None,
        rows: UInt32[Array, " batch"] | None = None,
        told: Float[Array, "batch labels width"] | None = None,
    ) -> tuple[Float[Array, "labels width"], list[Float[Array, "batch labels width"]]]:
        """Decodes.

        Args:
            memory: [B, S, d], or None: the nodes hear each other alone.
            valid: [B, S], False at padding; or None.
            graph: [L, L], True where label i may listen to label j (self loops
                included), or its lists; None is the complete graph.
            rows: see `layers`.
            told: [B, L, d], what each node of a row has been told before: added to v^0,
                then LayerNorm.

        Returns:
            The initial nodes v^0 [L, d], and the nodes after each of the 2T updates
            (attention and FFN; T without a memory), each [B, L, d].
        """
        shape = (self.num_labels, self.embedding_width)
        nodes = self.param("label_embeddings", self.embedding_init, shape)
        if self.embedding_width != self.width:
            xavier = nn.initializers.xavier_normal()
            nodes = nodes @ self.param(
                "input_map", xavier, (self.embedding_width, self.width)
            )
        initial, states = nodes, []
        if told is not None:
            nodes = LayerNorm(name="told_norm")(ops.repeat(nodes, told.shape[0]) + told)
        input_mask = None if valid is None else valid[:, None, None, :]
        dense = graph is not None and not isinstance(graph, Neighbours)
        label_mask = graph[None, None] if dense else graph
        for i in range(self.num_blocks):
            block = _DecoderBlock(
                self.num_heads,
                self.ffn_width,
                self.dropout,
                self.dtype,
                name=f"block_{i}",
            )
            states += block(nodes, memory, input_mask, label_mask, rows)
            nodes = states[-1]
        return initial, states


class _DecoderBlock(nn.Module):
    """Input-to-label messages, then label-to-label messages."""

    num_heads: int
    ffn_width: int
    dropout: float
    dtype: DTypeLike | None

    @nn.compact
    def __call__(self, nodes, memory, input_mask, label_mask, rows):
        block = functools.partial(
            MessageBlock,
            self.num_heads,
            self.ffn_width,
            self.dropout,
            dtype=self.dtype,
        )
        states = []
        if memory is not None:
            nodes = block(name="cross")(nodes, memory, input_mask, rows)
            states.append(nodes)
        return [*states, block(name="self")(nodes, nodes, label_mask, rows)]


def readout(
    nodes: Float[Array, "batch labels width"], weights: Float[Array, "labels width"]
) -> Float[Array, "batch labels"]:
    """logit_l = W_l . v_l (paper eq. 10); never B x L x L."""
    return ops.row_products(nodes, weights)
