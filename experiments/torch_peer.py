"""CbMLC for sets of tokens in PyTorch: what the speed of our training is held against.

A process of its own (`experiments/bench.py` starts it), so that torch and jax share no
thread pool and torch is needed nowhere else.  It imports nothing of ours:

    python experiments/torch_peer.py JOB.npz --dtype=bf16 --layout=ours --compile

JOB.npz has `settings` (JSON: num_heads, dropout, loss and optimizer settings),
`params/<path>` (ours, as linen names them) and `batch/<n>/{tokens,labels,mask}`.
Commands come as lines on the standard input, each is answered by a line of JSON:

    parity N       -> {"losses", "grad_norm", "logits"} of batch N in float32, without
                      dropout: the loss before and after a step of the optimizer, the
                      norm of the gradient before it, an .npy file of the logits before
    step N N ...   -> {"seconds", "cpu", "peak_mb"} of a training step on each of these
                      batches: lists of wall and processor seconds, memory so far

and the end of the input ends it.  While it waits for a command it does not compute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """As ours: no biases, heads of d / H, dropout on the weights."""

    def __init__(self, params: dict, heads: int, rate: float, fused: bool):
        super().__init__()
        self.heads, self.rate, self.fused = heads, rate, fused
        flat = [
            params[k].reshape(len(params[k]), -1) for k in ("query", "key", "value")
        ]
        if fused:
            self.qkv = nn.Parameter(torch.cat(flat, 1).T.contiguous())
        else:
            self.q, self.k, self.v = (nn.Parameter(x.T.contiguous()) for x in flat)
        width = flat[0].shape[0]
        self.out = nn.Parameter(params["out"].reshape(-1, width).T.contiguous())

    def _split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def forward(self, x, memory, mask):
        """x: [B, N, d] or [L, d], projected once; memory [B, S, d]; mask of keys."""
        if not self.fused:
            q = F.linear(x, self.q)
            k, v = F.linear(memory, self.k), F.linear(memory, self.v)
        elif x is memory:
            q, k, v = F.linear(x, self.qkv).chunk(3, -1)
        else:
            width = x.shape[-1]
            q = F.linear(x, self.qkv[:width])
            k, v = F.linear(memory, self.qkv[width:]).chunk(2, -1)
        q, k, v = self._split(q), self._split(k), self._split(v)
        rate = self.rate if self.training else 0.0
        if self.fused:
            if q.ndim == 3:
                q = q.expand(len(memory), -1, -1, -1)
            mixed = F.scaled_dot_product_attention(q, k, v, mask, rate)
        else:
            logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            if mask is not None:
                logits = logits.masked_fill(~mask, -1e9)
            mixed = F.dropout(logits.softmax(-1), rate, self.training) @ v
        return F.linear(mixed.transpose(1, 2).flatten(2), self.out)


class MessageBlock(nn.Module):
    """Attention, then the FFN; dropout, residual and LayerNorm after each."""

    def __init__(self, params: dict, heads: int, rate: float, fused: bool):
        super().__init__()
        self.rate = rate
        self.attention = Attention(params["attention"], heads, rate, fused)
        self.norms = nn.ModuleList(
            _norm(params[k]) for k in ("attention_norm", "ffn_norm")
        )
        ffn = params["ffn"]
        self.w1, self.w2 = (nn.Parameter(ffn[k].T.contiguous()) for k in ("w1", "w2"))
        self.b1, self.b2 = nn.Parameter(ffn["b1"]), nn.Parameter(ffn["b2"])

    def forward(self, x, memory, mask):
        messages = F.dropout(self.attention(x, memory, mask), self.rate, self.training)
        x = self.norms[0](x + messages)
        update = F.linear(F.relu(F.linear(x, self.w1, self.b1)), self.w2, self.b2)
        return self.norms[1](x + F.dropout(update, self.rate, self.training))


def _norm(params: dict) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(params["scale"]), eps=1e-5)
    norm.load_state_dict({"weight": params["scale"], "bias": params["bias"]})
    return norm


class CbMLC(nn.Module):
    """Encoder, decoder and readout.

    Args:
        params: nested dict of tensors, ours.
        settings: of the job.
        layout: "ours", or "lamp": projections one by one, attention written out, and
            the readout as a product B x L x L of which the diagonal is taken.
    """

    def __init__(self, params: dict, settings: dict, layout: str):
        super().__init__()
        sizes = settings["num_heads"], settings["dropout"], layout == "ours"
        encoder, decoder = params["encoder"], params["decoder"]
        self.layout = layout
        table = encoder["embedding"]
        table = torch.cat([torch.zeros(1, table.shape[1]), table])
        self.tokens = nn.Embedding(*table.shape, padding_idx=0, _weight=table)
        self.encoder = _blocks(encoder, lambda p: MessageBlock(p, *sizes))
        self.decoder = _blocks(
            decoder,
            lambda p: nn.ModuleList(
                MessageBlock(p[k], *sizes) for k in ("cross", "self")
            ),
        )
        self.labels = nn.Parameter(decoder["label_embeddings"])
        held = decoder["label_embeddings"].clone()
        self.register_buffer("word_vectors", held)
        self.map = None
        if "input_map" in decoder:
            self.map = nn.Parameter(decoder["input_map"].T.contiguous())
        self.readout = nn.Parameter(params["readout"])

    def forward(self, tokens):
        """tokens [B, S] -> logits after each of the 2T updates, [2T, B, L]."""
        mask = (tokens > 0)[:, None, None]
        z = self.tokens(tokens)
        for block in self.encoder:
            z = block(z, z, mask)
        v = self.labels if self.map is None else F.linear(self.labels, self.map)
        states = []
        for cross, agree in self.decoder:
            v = cross(v, z, mask)
            states.append(v)
            v = agree(v, v, None)
            states.append(v)
        weights = [self.readout.detach()] * (len(states) - 1) + [self.readout]
        if self.layout == "lamp":
            logits = [
                F.linear(v, w).diagonal(0, 1, 2)
                for v, w in zip(states, weights, strict=True)
            ]
        else:
            logits = [(v * w).sum(-1) for v, w in zip(states, weights, strict=True)]
        return torch.stack(logits)


def _blocks(params: dict, build) -> nn.ModuleList:
    count = sum(name.startswith("block_") for name in params)
    return nn.ModuleList(build(params[f"block_{i}"]) for i in range(count))


def asymmetric(logits, labels, gamma_pos: float, gamma_neg: float, margin: float):
    """Ben-Baruch et al. 2020, element by element."""
    p = torch.sigmoid(logits)
    positive = -((1 - p) ** gamma_pos) * F.logsigmoid(logits)
    shifted = (p - margin).clamp(min=0)
    negative = -(shifted**gamma_neg) * torch.log((1 - p + margin).clamp(max=1))
    return labels * positive + (1 - labels) * negative


def objective(model: CbMLC, settings: dict, batch: dict, autocast):
    """The loss of a batch, and the logits of all updates."""
    with autocast():
        logits = model(batch["tokens"])
    logits = logits.float()
    losses = asymmetric(logits, batch["labels"], *settings["asl"])
    losses = (losses * batch["mask"][:, None]).sum((1, 2))
    loss = losses[-1] + settings["intermediate_weight"] * losses[:-1].sum()
    penalty = (model.labels - model.word_vectors).square().sum()
    return loss + settings["cb_weight"] * penalty, logits


class Peer:
    """A model, its optimizer and the batches of a job."""

    def __init__(self, path: str, dtype: str, layout: str, compiled: bool):
        self._path = path
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files}
        self._settings = json.loads(str(arrays.pop("settings")))
        tree = _nested(arrays)
        self._batches = [
            {
                "tokens": torch.tensor(b["tokens"], dtype=torch.long),
                "labels": torch.tensor(b["labels"], dtype=torch.float32),
                "mask": torch.tensor(b["mask"], dtype=torch.float32),
            }
            for _, b in sorted(tree["batch"].items(), key=lambda item: int(item[0]))
        ]
        if layout == "lamp":  # pads to the longest row of the batch
            for batch in self._batches:
                longest = int((batch["tokens"] > 0).sum(1).max())
                batch["tokens"] = batch["tokens"][:, :longest].contiguous()
        torch.manual_seed(0)
        params = _tensors(tree["params"])
        self._model = CbMLC(params, self._settings, layout)
        self._autocast = contextlib.nullcontext
        if dtype == "bf16":
            self._autocast = lambda: torch.autocast("cpu", torch.bfloat16)
        self._optimizer = torch.optim.Adam(
            self._model.parameters(),
            lr=self._settings["learning_rate"],
            betas=(0.9, self._settings["beta2"]),
            weight_decay=self._settings["weight_decay"],
            fused=layout == "ours",
        )
        self._objective = objective
        if compiled:
            # One program for each padded length, as ours.
            torch._dynamo.config.recompile_limit = 64
            self._objective = torch.compile(objective, dynamic=False)

    def step(self, number: int) -> tuple[float, float]:
        """One training step; returns its seconds and those of the processors."""
        self._model.train()
        batch = self._batches[number]
        start, cpu = time.perf_counter(), time.process_time()
        self._optimizer.zero_grad(set_to_none=True)
        arguments = (self._model, self._settings, batch, self._autocast)
        loss, _ = self._objective(*arguments)
        loss.backward()
        self._optimizer.step()
        loss.item()
        return time.perf_counter() - start, time.process_time() - cpu

    def parity(self, number: int) -> dict:
        """What ours has to agree with; changes the parameters by one update."""
        self._model.eval()
        losses = []
        for _ in range(2):
            self._optimizer.zero_grad(set_to_none=True)
            loss, logits = objective(
                self._model,
                self._settings,
                self._batches[number],
                contextlib.nullcontext,
            )
            loss.backward()
            losses.append(loss.item())
            if len(losses) == 1:
                norms = [p.grad.norm() for p in self._model.parameters()]
                first = logits.detach().numpy()
                self._optimizer.step()
        path = f"{self._path}.logits.npy"
        np.save(path, first)
        norm = torch.stack(norms).norm().item()
        return {"losses": losses, "grad_norm": norm, "logits": path}


def _nested(arrays: dict) -> dict:
    tree: dict = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


def _tensors(tree):
    if isinstance(tree, dict):
        return {k: _tensors(v) for k, v in tree.items()}
    return torch.tensor(tree, dtype=torch.float32)


def main(arguments: list[str]) -> None:
    """Builds the model of a job and obeys the standard input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--layout", choices=("ours", "lamp"), default="ours")
    parser.add_argument("--compile", action="store_true")
    values = parser.parse_args(arguments)
    peer = Peer(values.job, values.dtype, values.layout, values.compile)
    answer({"ready": torch.__version__, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        name, *numbers = line.split()
        numbers = [int(n) for n in numbers]
        if name == "parity":
            answer(peer.parity(*numbers))
        elif name == "step":
            seconds, cpu = zip(*(peer.step(n) for n in numbers), strict=True)
            answer({"seconds": seconds, "cpu": cpu, "peak_mb": peak_mb()})
        else:
            sys.exit(f"unknown command {name!r}")


def peak_mb() -> float | None:
    """Peak resident memory in MiB on Linux (ru_maxrss counts the parent's, too)."""
    try:
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return round(int(lines["VmHWM"].split()[0]) / 1024)
    except (OSError, KeyError):
        return None


def answer(message: dict) -> None:
    """One line of JSON."""
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
