"""Golden data for the CbMLC model and losses: a reference in PyTorch, in float64.

Written from the formulae alone, so that it shares no code and no trick with the
package: attention and layer norm are PyTorch's own, gradients come from its autograd,
and the losses go straight through sigmoid and log. All logits are moderate, which
makes that safe in float64. Evaluation mode: no dropout.

Made with torch 2.13.0 (CPU build) and numpy 2.4.6, neither of which the tests need:

    pip install torch==2.13.0 numpy==2.4.6
    python tests/golden/make_cbmlc.py            # writes tests/golden/cbmlc.npz

Conventions
    Parameters, inputs and logits of `losses/` are float32 numbers in float64 arrays, so
    that a test in either precision starts from the same ones.
    Matrices are applied as x @ W, so they are stored [in, out]; per-head ones as
    [d, H, d/H] (query, key, value) and [H, d/H, d] (out).
    Row i of the token embedding is token id i + 1; id 0 is padding.
    graph[l, k] = True: label l (the query) receives from label k.
    intermediate[j]: logits after pair j of attention and FFN, in the order cross 0,
    self 0, cross 1, ...; the last pair's are `logits`.
    loss = loss_final + intermediate_weight * loss_intermediate + lambda * loss_cb.
    loss_final (also under the name loss_asl or loss_bce) is of the final logits only,
    loss_intermediate is the unweighted sum, and loss_cb is without lambda.
    grad/<name> is the gradient of loss.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

NUM_TOKENS, NUM_LABELS, WIDTH, NUM_HEADS, FFN_WIDTH = 30, 7, 8, 2, 16
ENCODER_BLOCKS, DECODER_BLOCKS = 2, 2
LAYER_NORM_EPS = 1e-5
INTERMEDIATE_WEIGHT = 0.2

# Different lengths, one of them 1, one token in two rows, both ends of the vocabulary.
TOKENS = np.array([[1, 30, 7, 12, 19], [5, 12, 28, 0, 0], [23, 0, 0, 0, 0]], np.int32)

CASES = {
    "full": dict(
        seed=1,
        label_width=6,
        self_attention=True,
        tied=False,
        graph=False,
        mask=[True, False, True],
        loss="asl",
        gamma_pos=1.0,
        gamma_neg=2.0,
        margin=0.05,
        regulariser="squared",
        weight=0.1,
    ),
    "square": dict(
        seed=2,
        label_width=8,
        self_attention=False,
        tied=False,
        graph=True,
        mask=[True, True, True],
        loss="asl",
        gamma_pos=2.0,
        gamma_neg=1.0,
        margin=0.1,
        regulariser="frobenius",
        weight=0.5,
    ),
    "tied": dict(
        seed=3,
        label_width=6,
        self_attention=True,
        tied=True,
        graph=False,
        mask=[True, True, True],
        loss="bce",
        regulariser="squared",
        weight=0.0,
    ),
}


# --- losses -----------------------------------------------------------------------


def bce(logits, labels):
    """-y log p - (1 - y) log(1 - p), element by element."""
    p = torch.sigmoid(logits)
    return -labels * torch.log(p) - (1 - labels) * torch.log(1 - p)


def asl(logits, labels, gamma_pos, gamma_neg, margin, stop_weight_gradient=False):
    """Asymmetric loss, element by element; the margin shifts the negatives only."""
    p = torch.sigmoid(logits)
    p_shift = torch.clamp(p - margin, min=0)
    weight_pos = (1 - p) ** gamma_pos
    weight_neg = p_shift**gamma_neg
    if stop_weight_gradient:
        weight_pos, weight_neg = weight_pos.detach(), weight_neg.detach()
    positive = -labels * weight_pos * torch.log(p)
    negative = -(1 - labels) * weight_neg * torch.log(1 - p_shift)
    return positive + negative


def context_penalty(label_embeddings, word_vectors, kind):
    """Sum of squares of E - H (`squared`), or its root (`frobenius`)."""
    squared = ((label_embeddings - word_vectors) ** 2).sum()
    return squared if kind == "squared" else torch.sqrt(squared)


def prediction_loss(logits, labels, mask, case):
    """ASL summed, or BCE averaged, over the labels of the valid rows."""
    logits, labels = logits[mask], labels[mask]
    if case["loss"] == "bce":
        return bce(logits, labels).mean()
    elements = asl(logits, labels, case["gamma_pos"], case["gamma_neg"], case["margin"])
    return elements.sum()


# --- model ------------------------------------------------------------------------


def attention(params, name, queries, memory, mask):
    """Multi-head attention; mask [B, 1, Sq, Sk] broadcastable, True = may be seen."""

    def heads(x, matrix):
        return torch.einsum("bsd,dhk->bhsk", x, params[f"{name}/{matrix}"])

    mixed = F.scaled_dot_product_attention(
        heads(queries, "query"),
        heads(memory, "key"),
        heads(memory, "value"),
        attn_mask=mask,
        scale=(WIDTH / NUM_HEADS) ** -0.5,
    )
    return torch.einsum("bhsk,hkd->bsd", mixed, params[f"{name}/out"])


def feed_forward(params, name, x):
    """relu(x W1 + b1) W2 + b2."""
    hidden = torch.relu(x @ params[f"{name}/w1"] + params[f"{name}/b1"])
    return hidden @ params[f"{name}/w2"] + params[f"{name}/b2"]


def layer_norm(params, name, x):
    scale, bias = params[f"{name}/scale"], params[f"{name}/bias"]
    return F.layer_norm(x, (WIDTH,), scale, bias, LAYER_NORM_EPS)


def attention_pair(params, name, x, memory, mask):
    """Attention, then FFN, each followed by residual and LayerNorm."""
    attended = attention(params, f"{name}/attention", x, memory, mask)
    x = layer_norm(params, f"{name}/attention_norm", x + attended)
    return ffn_sublayer(params, name, x)


def ffn_sublayer(params, name, x):
    transformed = feed_forward(params, f"{name}/ffn", x)
    return layer_norm(params, f"{name}/ffn_norm", x + transformed)


def encode(params, tokens, token_mask, self_attention):
    """Tokens [B, S] -> memory [B, S, d]: a set, hence no positions."""
    padding_row = torch.zeros(1, WIDTH, dtype=torch.float64)
    table = torch.cat([padding_row, params["encoder/embedding"]])
    x = table[tokens]
    for i in range(ENCODER_BLOCKS):
        name = f"encoder/block_{i}"
        if self_attention:
            x = attention_pair(params, name, x, x, token_mask)
        else:
            x = ffn_sublayer(params, name, x)
    return x


def decode(params, memory, token_mask, graph):
    """Memory -> initial label nodes v^0 [L, d] and the nodes after each pair."""
    initial = params["decoder/label_embeddings"]
    if "decoder/input_map" in params:
        initial = initial @ params["decoder/input_map"]
    nodes = initial.expand(len(memory), -1, -1)
    states = []
    for i in range(DECODER_BLOCKS):
        name = f"decoder/block_{i}"
        nodes = attention_pair(params, f"{name}/cross", nodes, memory, token_mask)
        states.append(nodes)
        nodes = attention_pair(params, f"{name}/self", nodes, nodes, graph)
        states.append(nodes)
    return initial, states


def forward(params, tokens, graph, self_attention):
    """Logits [B, L] and intermediate logits [2T - 1, B, L]."""
    token_mask = (tokens != 0)[:, None, None, :]
    memory = encode(params, tokens, token_mask, self_attention)
    initial, states = decode(params, memory, token_mask, graph)
    readout = params.get("readout", initial)
    logits = (states[-1] * readout).sum(-1)
    intermediate = [(nodes * readout.detach()).sum(-1) for nodes in states[:-1]]
    return logits, torch.stack(intermediate)


def total_loss(params, inputs, case):
    """The model, and every part of the loss; see the top of the file."""
    logits, intermediate = forward(
        params, inputs["tokens"], inputs.get("graph"), case["self_attention"]
    )
    labels, mask = inputs["labels"].double(), inputs["mask"]
    final = prediction_loss(logits, labels, mask, case)
    early = sum(prediction_loss(x, labels, mask, case) for x in intermediate)
    penalty = context_penalty(
        params["decoder/label_embeddings"], inputs["word_vectors"], case["regulariser"]
    )
    return {
        "logits": logits,
        "intermediate": intermediate,
        "loss_final": final,
        f"loss_{case['loss']}": final,
        "loss_intermediate": early,
        "loss_cb": penalty,
        "loss": final + INTERMEDIATE_WEIGHT * early + case["weight"] * penalty,
    }


# --- random parameters and inputs -------------------------------------------------


def as_float32(x):
    """Float64 values rounded to what float32 can hold."""
    return x.astype(np.float32).astype(np.float64)


def make_params(rng, case):
    """Arrays under the names of the file; biases and scales are not trivial."""
    head_width = WIDTH // NUM_HEADS
    params = {}

    def normal(name, shape, std, mean=0.0):
        params[name] = as_float32(rng.normal(mean, std, shape))

    def norm(name):
        normal(f"{name}/scale", WIDTH, 0.2, mean=1.0)
        normal(f"{name}/bias", WIDTH, 0.2)

    def attention_sublayer(name):
        for matrix in ("query", "key", "value"):
            shape = (WIDTH, NUM_HEADS, head_width)
            normal(f"{name}/attention/{matrix}", shape, WIDTH**-0.5)
        normal(f"{name}/attention/out", (NUM_HEADS, head_width, WIDTH), WIDTH**-0.5)
        norm(f"{name}/attention_norm")

    def ffn_sublayer(name):
        normal(f"{name}/ffn/w1", (WIDTH, FFN_WIDTH), WIDTH**-0.5)
        normal(f"{name}/ffn/b1", FFN_WIDTH, 0.2)
        normal(f"{name}/ffn/w2", (FFN_WIDTH, WIDTH), FFN_WIDTH**-0.5)
        normal(f"{name}/ffn/b2", WIDTH, 0.2)
        norm(f"{name}/ffn_norm")

    normal("encoder/embedding", (NUM_TOKENS, WIDTH), 1.0)
    for i in range(ENCODER_BLOCKS):
        if case["self_attention"]:
            attention_sublayer(f"encoder/block_{i}")
        ffn_sublayer(f"encoder/block_{i}")
    normal("decoder/label_embeddings", (NUM_LABELS, case["label_width"]), 0.7)
    if case["label_width"] != WIDTH:
        shape = (case["label_width"], WIDTH)
        normal("decoder/input_map", shape, case["label_width"] ** -0.5)
    for i in range(DECODER_BLOCKS):
        for kind in ("cross", "self"):
            attention_sublayer(f"decoder/block_{i}/{kind}")
            ffn_sublayer(f"decoder/block_{i}/{kind}")
    if not case["tied"]:
        normal("readout", (NUM_LABELS, WIDTH), 0.7)
    return params


def make_graph(rng):
    """A random directed graph with self loops; label 3 has no other neighbour."""
    graph = rng.random((NUM_LABELS, NUM_LABELS)) < 0.4
    graph[3] = False
    np.fill_diagonal(graph, True)
    return graph


def make_inputs(rng, case):
    vectors = rng.normal(0.0, 0.7, (NUM_LABELS, case["label_width"]))
    inputs = {
        "tokens": TOKENS,
        "labels": (rng.random((len(TOKENS), NUM_LABELS)) < 0.4).astype(np.uint8),
        "mask": np.array(case["mask"]),
        "word_vectors": as_float32(vectors),
    }
    if case["graph"]:
        inputs["graph"] = make_graph(rng)
    return inputs


# --- the file ---------------------------------------------------------------------


def model_arrays(case):
    """All arrays of one case, without the name of the case."""
    rng = np.random.default_rng(case["seed"])
    params = make_params(rng, case)
    inputs = make_inputs(rng, case)

    leaves = {k: torch.tensor(v, requires_grad=True) for k, v in params.items()}
    results = total_loss(leaves, {k: torch.tensor(v) for k, v in inputs.items()}, case)
    results["loss"].backward()

    hyper = {k: case[k] for k in ("gamma_pos", "gamma_neg", "margin") if k in case}
    hyper |= {
        "lambda": case["weight"],
        "regulariser": case["regulariser"],
        "intermediate_weight": INTERMEDIATE_WEIGHT,
        "num_heads": NUM_HEADS,
        "encoder_blocks": ENCODER_BLOCKS,
        "decoder_blocks": DECODER_BLOCKS,
        "self_attention": case["self_attention"],
        "tied": case["tied"],
    }
    return {
        **{f"param/{k}": v for k, v in params.items()},
        **{f"grad/{k}": v.grad.numpy() for k, v in leaves.items()},
        **inputs,
        **{k: v.detach().numpy() for k, v in results.items()},
        **{k: np.array(v) for k, v in hyper.items()},
    }


def value_and_grad(function, x, *args):
    """function(x, *args), and the gradient of its sum with respect to x."""
    x = torch.tensor(x, requires_grad=True)
    value = function(x, *args)
    (grad,) = torch.autograd.grad(value.sum(), x)
    return value.detach().numpy(), grad.numpy()


def loss_arrays():
    """Stand-alone values of every loss, element by element."""
    rng = np.random.default_rng(4)
    logits = as_float32(rng.uniform(-6, 6, (4, 6)))
    labels = (rng.random((4, 6)) < 0.5).astype(np.uint8)
    y = torch.tensor(labels).double()
    arrays = {"logits": logits, "labels": labels}

    arrays["bce/value"], arrays["bce/grad"] = value_and_grad(bce, logits, y)

    for i, setting in enumerate([(0.0, 0.0, 0.0), (1.0, 4.0, 0.05), (2.0, 1.0, 0.1)]):
        value, grad = value_and_grad(asl, logits, y, *setting)
        arrays |= {f"asl_{i}/value": value, f"asl_{i}/grad": grad}
        for key, number in zip(
            ("gamma_pos", "gamma_neg", "margin"), setting, strict=True
        ):
            arrays[f"asl_{i}/{key}"] = np.array(number)
        if i == 1:
            _, grad = value_and_grad(asl, logits, y, *setting, True)
            arrays[f"asl_{i}/grad_stop_weight"] = grad

    embeddings, vectors = as_float32(rng.normal(0.0, 0.7, (2, NUM_LABELS, 6)))
    arrays |= {"cb/label_embeddings": embeddings, "cb/word_vectors": vectors}
    for kind in ("squared", "frobenius"):
        value, grad = value_and_grad(
            context_penalty, embeddings, torch.tensor(vectors), kind
        )
        arrays |= {f"cb/{kind}/value": value, f"cb/{kind}/grad": grad}
    return arrays


def make_arrays():
    arrays = {"torch_version": np.array(torch.__version__.split("+")[0])}
    for name, case in CASES.items():
        arrays |= {f"{name}/{k}": v for k, v in model_arrays(case).items()}
    arrays |= {f"losses/{k}": v for k, v in loss_arrays().items()}
    return arrays


if __name__ == "__main__":
    torch.set_num_threads(1)  # one order of summation, so that a second run is equal
    path = Path(__file__).with_name("cbmlc.npz")
    np.savez_compressed(path, **make_arrays())
    print(f"{path.name}: {path.stat().st_size} bytes")
