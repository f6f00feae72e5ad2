"""Labels as a sequence: a recurrent encoder and decoder, and a beam search.

EncDec of Nam, Loza Mencia, Kim and Fuernkranz, "Maximizing Subset Accuracy with
Recurrent Neural Networks in Multi-label Classification", NeurIPS 2017, as in the
authors' code (github.com/JinseokNam/mlc2seq).  A set of labels is the sequence of its
labels, most frequent first, then EOS:

    P(y | x) = prod_t P(y_t | y_1 .. y_{t-1}, x),    loss = -log P(y | x)

Shapes: B rows, S tokens, L labels, C = L + 1 classes (class L is EOS), T steps, K
hypotheses, H and D widths of one encoder direction and of the decoder, M = 2 H width
of the memory, E of the label embeddings.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from cbmlc_jax.models.baselines.beam import (
    Beams,
    LogProbs,
    beam_scores,
    beam_search,
    best_sequence,
    contained,
    lengths,
)
from cbmlc_jax.models.layers import Dropout
from cbmlc_jax.models.ops import keep_mask
from cbmlc_jax.models.outputs import Outputs

# Scores within these have finite logits in float32.
_LOWEST, _HIGHEST = 1e-20, 1 - 1e-6
# Finite: a row without tokens attends evenly, to a memory of zeros.
_MASKED = -1e9


def label_sequences(
    labels: Int[Array, "batch labels"], label_order: tuple[int, ...], max_labels: int
) -> Int[Array, "batch steps"]:
    """[B, L] of 0 and 1 -> [B, T]: a row's labels in order, then EOS to the end.

    T = max_labels + 1; of a row with more labels, the last in order are cut.
    """
    num_labels = len(label_order)
    classes = jnp.array([*label_order, num_labels], jnp.int32)
    present = jnp.take(labels, classes[:-1], axis=1) > 0
    ranks = jnp.where(present, jnp.arange(num_labels)[None], num_labels)
    ranks = jnp.sort(ranks, axis=1)[:, :max_labels]
    return jnp.pad(classes[ranks], ((0, 0), (0, 1)), constant_values=num_labels)


def _logit(scores: Array) -> Array:
    scores = jnp.clip(scores, _LOWEST, _HIGHEST)
    return jnp.log(scores) - jnp.log1p(-scores)


def _until_eos(sequences: Array, eos: int) -> Array:
    """[B, T]: the steps up to and with the first EOS."""
    return jnp.arange(sequences.shape[1])[None] < lengths(sequences, eos)[:, None]


def _peaks(log_probs: Array, sequences: Array) -> Array:
    """[B, L]: the largest probability of each label in the steps of a sequence."""
    steps = _until_eos(sequences, log_probs.shape[-1] - 1)[..., None]
    return jnp.exp(jnp.where(steps, log_probs, -jnp.inf).max(1))[:, :-1]


def _affine(x: Array, kernel: Array, bias: Array) -> Array:
    return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def _three(init):
    """[n, 3 D] as three matrices [n, D] side by side, each drawn by itself."""

    def draw(key, shape, dtype=jnp.float32):
        keys, shape = jax.random.split(key, 3), (shape[0], shape[1] // 3)
        return jnp.concatenate([init(k, shape, dtype) for k in keys], axis=1)

    return draw


_glorot, _zeros = nn.initializers.glorot_uniform(), nn.initializers.zeros_init()
_gates_init, _state_init = _three(_glorot), _three(nn.initializers.orthogonal())


def gru(gates: Array, state: Array, kernel: Array) -> Array:
    """One step of a gated recurrent unit; its input's projections are made before.

        r, u = sigmoid(x_r + h U_r), sigmoid(x_u + h U_u)
        h' = u h + (1 - u) tanh(x_c + r (h U_c))

    gates: [..., 3 D], x_r, x_u, x_c with biases; state h: [..., D]; kernel: [D, 3 D].
    """
    x_reset, x_update, x_candidate = jnp.split(gates, 3, axis=-1)
    h_reset, h_update, h_candidate = jnp.split(state @ kernel, 3, axis=-1)
    reset = jax.nn.sigmoid(x_reset + h_reset)
    update = jax.nn.sigmoid(x_update + h_update)
    return update * state + (1 - update) * jnp.tanh(x_candidate + reset * h_candidate)


class Encoder(nn.Module):
    """A GRU over the tokens in either direction; padding leaves its state as it is.

    Attributes:
        num_tokens: F; ids are 1..F, 0 is padding.
        token_width: of the embeddings, which start at a length of about 1, that of the
            authors' word vectors (theirs are pretrained and stay fixed).
        width: H.
    """

    num_tokens: int
    token_width: int
    width: int

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch tokens memory"]:
        """[B, S] ids -> [B, S, M]: the forward states beside the backward ones."""
        normal = nn.initializers.normal(self.token_width**-0.5)
        table = self.param("embedding", normal, (self.num_tokens, self.token_width))
        # Time first, as scan wants it; the gates of all steps are one product.
        valid, x = (tokens > 0).T[..., None], table[jnp.maximum(tokens.T - 1, 0)]
        width, start = self.width, jnp.zeros((x.shape[1], self.width), x.dtype)
        memory = []
        for way in ("forward", "backward"):
            kernel = self.param(f"{way}_input", _gates_init, (x.shape[-1], 3 * width))
            bias = self.param(f"{way}_bias", _zeros, (3 * width,))
            recurrent = self.param(f"{way}_state", _state_init, (width, 3 * width))

            def step(state, inputs, recurrent=recurrent):
                gates, valid = inputs
                state = jnp.where(valid, gru(gates, state, recurrent), state)
                return state, state

            steps = (_affine(x, kernel, bias), valid)
            memory += [jax.lax.scan(step, start, steps, reverse=way == "backward")[1]]
        return jnp.swapaxes(jnp.concatenate(memory, -1), 0, 1)


def embed(p: dict[str, Array], last: Array) -> tuple[Array, Array]:
    """Embeddings [..., E] of the last classes (0 for EOS), their gates [..., 3 D]."""
    label = jnp.pad(p["label_embedding"], ((0, 1), (0, 0)))[last]
    return label, _affine(label, p["gates_label"], p["gates_bias"])


def attend(p: dict[str, Array], source: tuple[Array, ...], state: Array) -> Array:
    """Additive attention: sum_j softmax_j(v . tanh(W s + U h_j + b)) h_j.

    source: memory h and keys U h + b, both [B, S, M], and what is valid of them [B, S];
    state s: [B, K, D] -> [B, K, M].
    """
    memory, keys, valid = source
    query = (state @ p["attention_query"])[:, :, None]
    scores = (jnp.tanh(query + keys[:, None]) @ p["attention_score"])[..., 0]
    weights = jax.nn.softmax(jnp.where(valid[:, None], scores, _MASKED))
    return jnp.einsum("bks,bsm->bkm", weights, memory)


def advance(p: dict[str, Array], source, state: Array, gates: Array):
    """State [B, K, D], gates of the last label -> next state, context [B, K, M]."""
    # Recomputed in the backward pass: the tanh is [B, S, M] in each of the T steps.
    context = jax.checkpoint(attend)(p, source, state)
    return gru(gates + context @ p["gates_context"], state, p["gates_state"]), context


def hidden_layer(p: dict[str, Array], state: Array, label: Array, context: Array):
    """tanh(W s_t + U e(y_{t-1}) + V c_t + b): [..., E]."""
    mixed = state @ p["hidden_state"] + context @ p["hidden_context"]
    return jnp.tanh(mixed + _affine(label, p["hidden_label"], p["hidden_bias"]))


def classify(p: dict[str, Array], hidden: Array) -> Array:
    """Log probabilities of the classes: [..., E] -> [..., C]."""
    return jax.nn.log_softmax(_affine(hidden, p["out"], p["out_bias"]))


class Seq2Seq(nn.Module):
    """EncDec of Nam et al. 2017.

    Attributes:
        num_tokens: F.
        label_order: a permutation of the labels, most frequent first.
        max_labels: the most labels of a row; T = max_labels + 1.
        token_width, label_width, encoder_width, decoder_width: of the token embeddings,
            E, H and D.
        word_dropout: rate at which whole tokens are left out in training.
        dropout: rate on memory, decoder states and hidden layer.  The authors' code
            does this, at .2, under the name `word_drop_prob`; it drops no words.
        beam: K.
    """

    num_tokens: int
    label_order: tuple[int, ...]
    max_labels: int
    token_width: int = 512
    label_width: int = 256
    encoder_width: int = 512
    decoder_width: int = 1024
    word_dropout: float = 0.2
    dropout: float = 0.0
    beam: int = 5

    @nn.compact
    def __call__(
        self,
        inputs: dict[str, Array],
        graph: Array | None = None,
        rows: UInt32[Array, " batch"] | None = None,
        labels: Int[Array, "batch labels"] | None = None,
    ) -> Outputs:
        """The loss, given the labels [B, L]; else the beam's scores and its best set.

        inputs holds `tokens` int32 [B, S], ids in their order, 0 is padding.

        The loss of a row is the cross-entropy summed over its steps, EOS included (so
        does the authors' code, and averages over the batch); the logits beside it come
        of the given labels and are no prediction.  graph is not read; rows [B] are the
        row numbers of the global batch for dropout, None for none.
        """
        tokens, eos = inputs["tokens"], len(self.label_order)
        max_labels = min(self.max_labels, eos)
        if rows is not None and self.word_dropout:
            words = jax.random.key_data(self.make_rng("dropout"))
            keep = keep_mask(words, rows, tokens.shape, self.word_dropout)
            tokens = jnp.where(keep, tokens, 0)
        half, p = self.encoder_width, self._decoder_params()
        encoder = Encoder(self.num_tokens, self.token_width, half, name="encoder")
        memory = encoder(tokens)
        # The last state of either direction: padding has not moved them.
        ends = jnp.concatenate([memory[:, -1, :half], memory[:, 0, half:]], axis=-1)
        start = jnp.tanh(_affine(ends, p["start"], p["start_bias"]))[:, None]
        memory = Dropout(self.dropout, name="memory_dropout")(memory, rows)
        keys = _affine(memory, p["attention_key"], p["attention_bias"])
        source = (memory, keys, tokens > 0)

        if self.is_initializing():
            return Outputs(jnp.zeros((tokens.shape[0], eos)))
        if labels is not None:
            sequences = label_sequences(labels, self.label_order, max_labels)
            log_probs = self._forced(p, source, start, sequences, rows)
            chosen = jnp.take_along_axis(log_probs, sequences[..., None], -1)[..., 0]
            loss = -jnp.where(_until_eos(sequences, eos), chosen, 0).sum(1)
            return Outputs(_logit(_peaks(log_probs, sequences)), loss=loss)

        found = self._search(p, source, start, max_labels + 1)
        best = best_sequence(*found, eos)
        tail = _peaks(self._forced(p, source, start, best, None), best)
        logits = _logit(beam_scores(*found, tail))
        return Outputs(logits, decoded=contained(best, eos))

    def _decoder_params(self) -> dict[str, Array]:
        """By name, so that what uses them is a pure function."""
        num_labels, e = len(self.label_order), self.label_width
        m, d = 2 * self.encoder_width, self.decoder_width
        normal = nn.initializers.normal((num_labels + 1) ** -0.5)
        specs = {
            "label_embedding": (normal, (num_labels, e)),
            "start": (_glorot, (m, d)),
            "start_bias": (_zeros, (d,)),
            "gates_label": (_gates_init, (e, 3 * d)),
            "gates_context": (_gates_init, (m, 3 * d)),
            "gates_state": (_state_init, (d, 3 * d)),
            "gates_bias": (_zeros, (3 * d,)),
            "attention_query": (_glorot, (d, m)),
            "attention_key": (_glorot, (m, m)),
            "attention_bias": (_zeros, (m,)),
            "attention_score": (_glorot, (m, 1)),
            "hidden_state": (_glorot, (d, e)),
            "hidden_label": (_glorot, (e, e)),
            "hidden_context": (_glorot, (m, e)),
            "hidden_bias": (_zeros, (e,)),
            "out": (_glorot, (e, num_labels + 1)),
            "out_bias": (_zeros, (num_labels + 1,)),
        }
        return {k: self.param(k, init, shape) for k, (init, shape) in specs.items()}

    def _search(self, p, source, start, steps: int) -> tuple[Beams, LogProbs]:
        """`beam_search` of at most `steps` steps from the state [B, 1, D]."""

        def step(state, last):
            label, gates = embed(p, last)
            state, context = advance(p, source, state, gates)
            return classify(p, hidden_layer(p, state, label, context)), state

        batch, num_labels = start.shape[0], len(self.label_order)
        state = jnp.repeat(start, self.beam, axis=1)
        return beam_search(step, state, batch, num_labels, self.beam, steps)

    def _forced(self, p, source, start, sequences, rows) -> Array:
        """Log probabilities [B, T, C] of every class, given the classes before it."""
        eos = len(self.label_order)
        last = jnp.pad(sequences[:, :-1], ((0, 0), (1, 0)), constant_values=eos)
        label, gates = embed(p, last)

        def step(state, gates):
            state, context = advance(p, source, state, gates[:, None])
            return state, (state[:, 0], context[:, 0])

        _, steps = jax.lax.scan(step, start, jnp.swapaxes(gates, 0, 1))
        state, context = (jnp.swapaxes(x, 0, 1) for x in steps)
        state = Dropout(self.dropout, name="state_dropout")(state, rows)
        hidden = hidden_layer(p, state, label, context)
        return classify(p, Dropout(self.dropout, name="hidden_dropout")(hidden, rows))
