"""A training step as a pure function: its state, loss, gradient and update."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from cbmlc_jax import losses, optim, rngs, systems
from cbmlc_jax.models import BACKBONES, CONSTANT, OWN_OBJECTIVE, create_backbone
from cbmlc_jax.parallel import gathered, mean, total
from cbmlc_jax.thresholds import LEAST_INFORMATION, Rates


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
        step: int32 [], optimizer steps done.
        params: model parameters.
        stats: running averages of batch normalisation; {} where there is none.
        opt_state: Optax state.
        average: moving average of the parameters; {} where there is none.
    """

    step: Array
    params: PyTree
    stats: PyTree
    opt_state: PyTree
    average: PyTree = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> PyTree:
        """What the system scores with."""
        return {"params": self.average or self.params} | (
            {"batch_stats": self.stats} if self.stats else {}
        )


def element_losses(
    settings,
    logits: Array,
    labels: Array,
    mask: Array,
    epoch: Array,
    rates: Rates,
    gather: Callable,
    added: Array | None = None,
) -> Array:
    """The loss of config.loss, element by element, [B, L].

    Args:
        settings: config.loss.
        logits, labels: [B, L].
        mask: [B] valid rows.
        epoch: int32 [], from 1, for the losses that change their mind about labels.
        rates: noise rates of the training labels, for `forward`.
        gather: an array of this device -> those of all devices, for `large_loss`.
        added: [B] rates of the rows; `forward` then takes them for r0, and for r1 that
            of all rows where config.loss.lost_labels, else 0, so that p is the
            probability of a label that holds and was kept.
    """
    if settings.name == "bce":
        return losses.bce(logits, labels)
    if settings.name == "forward":
        if added is not None:
            lost = rates.r1 if settings.lost_labels else 0.0
            # A row with no information left would turn the gradient round.
            lost = jnp.minimum(lost, 1 - LEAST_INFORMATION - added[:, None])
            return losses.forward(logits, labels, added[:, None], jnp.maximum(lost, 0))
        return losses.forward(logits, labels, rates.r0, rates.r1)
    if settings.name == "large_loss":
        share = losses.large_loss_share(epoch, settings.rejected_per_epoch)
        return losses.large_loss(logits, labels, share, mask, gather)
    positive = {"margin": settings.positive_margin, "gamma": settings.positive_gamma}
    if settings.name == "hill":
        return losses.hill(logits, labels, weight=settings.hill_weight, **positive)
    if settings.name == "splc":
        tau = settings.splc_threshold
        return losses.splc(logits, labels, epoch, tau=tau, **positive)
    return losses.asl(
        logits,
        labels,
        gamma_pos=settings.gamma_pos,
        gamma_neg=settings.gamma_neg,
        margin=settings.margin,
        stop_focal_gradient=settings.stop_focal_gradient,
    )


def make_train_step(
    model,
    config,
    tx: optax.GradientTransformation,
    axis: str | None,
    *,
    steps_per_epoch: int,
):
    """Builds `step(state, batch, constants) -> (state, {"loss", "examples"})`.

    The objective of the global batch, whatever the number of devices:

        sum_i sum_l loss_il + w sum_t (the same of intermediate prediction t)
            [divided by (valid rows) L for loss.reduction=mean]
        + lambda context_penalty

    or, for a model with an objective of its own, sum_i loss_i [divided by the valid
    rows].  Where rows have a weight w_i, each loss_i is w_i loss_i, and "valid rows" is
    the sum of their weights.

    Args:
        model: linen module that returns `models.Outputs`.
        config: the run's config.
        tx: optimizer.
        axis: name of the device axis to sum over, or None.
        steps_per_epoch: for the losses that know the epoch.
    """
    settings, weight = config.loss, config.model.intermediate_weight
    gather = functools.partial(gathered, axis=axis)

    def data_loss(params, stats, batch, constants, step):
        outputs, changed = model.apply(
            {"params": params, "batch_stats": stats},
            systems.model_inputs(batch),
            constants["graph"],
            batch["rows"],
            batch["labels"],
            rngs={
                name: jax.random.fold_in(rngs.wrapped(words), step)
                for name, words in constants["keys"].items()
            },
            mutable=["batch_stats"],
        )
        stats = changed.get("batch_stats", {})
        weight_of_row = batch.get("sample_weight")
        if outputs.loss is not None:
            loss = outputs.loss
            if weight_of_row is not None:
                loss *= weight_of_row
            return jnp.sum(jnp.where(batch["mask"], loss, 0.0)), stats
        labels = batch["labels"].astype(outputs.logits.dtype)

        def summed(logits):
            mask, epoch = batch["mask"], step // steps_per_epoch + 1
            element = element_losses(
                settings,
                logits,
                labels,
                mask,
                epoch,
                Rates(*constants["rates"]),
                gather,
                batch.get("added"),
            )
            if "ignored" in batch:
                element = jnp.where(batch["ignored"], 0.0, element)
            if weight_of_row is not None:
                element *= weight_of_row[:, None]
            return losses.total(element, mask)

        loss = summed(outputs.logits)
        if outputs.intermediate is not None:
            loss += weight * jnp.sum(jax.vmap(summed)(outputs.intermediate))
        return loss, stats

    def context_loss(params, word_vectors):
        embeddings = params["decoder"]["label_embeddings"]
        penalty = losses.context_penalty(embeddings, word_vectors, settings.cb_norm)
        return settings.cb_weight * penalty

    def step(state: TrainState, batch, constants):
        def gradient(batch):
            return jax.value_and_grad(data_loss, has_aux=True)(
                state.params, state.stats, batch, constants, state.step
            )

        parts = systems.num_parts(config.model.name, *batch["labels"].shape)
        if state.stats or settings.name == "large_loss":
            parts = 1  # they look at all rows of a batch together
        (loss, stats), grads = systems.summed(gradient, batch, parts)
        examples = jnp.sum(batch["mask"])
        rows = jnp.sum(batch["sample_weight"]) if "sample_weight" in batch else examples
        loss, grads, examples, rows = total((loss, grads, examples, rows), axis)
        if settings.reduction == "mean":
            terms = jnp.where(rows > 0, rows, 1)
            if config.model.name not in OWN_OBJECTIVE:
                terms *= batch["labels"].shape[-1]
            loss, grads = jax.tree.map(lambda x: x / terms, (loss, grads))
        if settings.cb_weight:
            # Outside the sum over devices: the context term counts once.
            context, more = jax.value_and_grad(context_loss)(
                state.params, constants["word_vectors"]
            )
            loss, grads = loss + context, jax.tree.map(jnp.add, grads, more)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if config.optim.averaging:
            average = averaged(average, params, state.step, config.optim.averaging)
        return (
            TrainState(state.step + 1, params, mean(stats, axis), opt_state, average),
            {"loss": loss, "examples": examples},
        )

    return step


def step_constants(config, graph, word_vectors: Array, rates: Rates) -> dict:
    """What a step reads besides: arguments, since they differ from seed to seed.

    Args:
        config: gives the seed.
        graph: as `systems.Neural` has it.
        word_vectors: float32 [L, P] of the labels, for the context loss.
        rates: noise rates of the training labels; 0 where they are not usable, which
            only a loss with rates by row gets as far as.
    """
    rates = rates if rates.usable else Rates(0.0, 0.0)
    return {
        "graph": graph,
        "word_vectors": word_vectors,
        "keys": {n: rngs.words(config.seed, n) for n in ("dropout", "sample")},
        "rates": (np.float64(rates.r0), np.float64(rates.r1)),
    }


def averaged(average: PyTree, params: PyTree, step: Array, decay: float) -> PyTree:
    """a <- k a + (1 - k) p with k = min(decay, (1 + t) / (10 + t)), t from 0.

    The smaller k of the first steps forgets the random start.
    """
    keep = jnp.minimum(decay, (1 + step) / (10 + step)).astype(jnp.float32)
    return jax.tree.map(lambda a, p: a + (1 - keep) * (p - a), average, params)


def make_tx(config, steps_per_epoch: int) -> optax.GradientTransformation:
    """The optimizer that config.optim describes."""
    settings, encoder = config.optim, config.model.encoder
    frozen, slow = CONSTANT, None
    if not config.embeddings.trainable:
        frozen += ("label_embeddings",)
    if encoder.name in BACKBONES:
        stages = create_backbone(encoder).frozen_modules
        frozen += tuple(f"backbone/{name}" for name in stages)
        slow = ("backbone", settings.backbone_rate)
    return optim.make_optimizer(
        name=settings.name,
        learning_rate=optim.decayed(
            settings.learning_rate,
            factor=settings.decay,
            times=settings.decay_times,
            steps=config.train.num_epochs * steps_per_epoch,
        ),
        beta2=settings.beta2,
        clip_norm=settings.clip_norm,
        weight_decay=settings.weight_decay,
        decoupled=settings.decoupled,
        frozen=frozen,
        slow=slow,
    )
