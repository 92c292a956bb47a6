"""One update: both losses, their gradient and the optimizer, in one compiled function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grit_jax.batch import EmbeddingBatch, GenerativeBatch, GritBatch
from grit_jax.config import Config
from grit_jax.contrastive import contrastive_loss
from grit_jax.execution import Execution, map_chunks
from grit_jax.losses import balance_loss, next_token_loss
from grit_jax.model.moe import RouterStats
from grit_jax.model.pooling import embed_rows
from grit_jax.model.transformer import Params, Transformer, bind, param_axes
from grit_jax.sharding import constrain, mesh_axes, on_devices, split_axes
from grit_jax.train.health import health_parts
from grit_jax.train.optimizer import updates_done
from grit_jax.train.state import TrainState, merged

Metrics = dict[str, jax.Array]

TOKEN_LOSSES = "tokens/losses"

_ROWS = ("batch", "length")


def _over_devices(chunks: Any) -> Any:
    """Sums over the chunks, the first dim of every array, and over the devices that hold the batch."""
    return jax.tree.map(lambda x: jax.lax.psum(jnp.sum(x, axis=0), split_axes("batch")), chunks)


def _own_texts(vectors: jax.Array, slots: jax.Array) -> jax.Array:
    """This device's share of the vectors at `slots` of the global batch; `vectors` are those of its own rows."""
    axes = split_axes("batch")
    local = slots - jax.lax.axis_index(axes) * len(vectors) if axes else slots
    here = (local >= 0) & (local < len(vectors))
    found = jnp.where(here[:, None], vectors[jnp.where(here, local, 0)], 0)
    return jax.lax.psum_scatter(found, axes, tiled=True) if axes else found


def _balance(name: str, stats: RouterStats | None) -> Metrics:
    """The balance loss of the batch's router statistics; nothing without experts."""
    return {} if stats is None else {name: balance_loss(*stats)}


@dataclasses.dataclass(frozen=True)
class Objective:
    """The joint loss of a model as a function of its parameters and a batch.

    Attributes:
      model: Abstract model; parameters are bound to it in every call.
      config: The run's settings.
      execution: How the model computes.
    """

    model: Transformer
    config: Config
    execution: Execution

    def embedding_losses(self, params: Params, batch: EmbeddingBatch) -> tuple[Metrics, Metrics]:
        """L_rep of the batch and the balance loss of its experts, float32 scalars; and its vectors' `health_parts`."""
        settings = self.config.model.embedding

        def on_device(params, tokens, rows, *slots):
            model = bind(self.model, params)

            def vectors(rows):
                return embed_rows(model, *rows, settings=settings, execution=self.execution)

            # The table of tokens is gathered once, outside the chunks. Pooled: [chunks, rows, segments, embed].
            rows = (model.embed(tokens, self.execution.dtype), *rows)
            pooled, stats = map_chunks(vectors, rows, self.config.train.embedding_chunks)
            pooled = pooled.reshape(-1, pooled.shape[-1])
            return tuple(_own_texts(pooled, texts) for texts in slots), _over_devices(stats)

        rows = (batch.segment_ids, batch.positions, batch.pool_weights)
        texts = ("batch", "activation_embed")
        split = on_devices(
            on_device,
            in_axes=(param_axes(self.model), _ROWS, (_ROWS,) * 3, ("whole",), ("whole",)),
            out_axes=((texts, texts), ()),
            over=mesh_axes("batch"),
        )
        (query, passage), stats = split(params, batch.tokens, rows, batch.query_slots, batch.passage_slots)
        loss = contrastive_loss(
            query,
            passage,
            temperature=self.config.loss.temperature,
            query_weights=batch.query_weights,
            passage_ids=batch.passage_ids,
            negatives=self.config.loss.negatives,
        )
        return {"loss/embedding": loss} | _balance("loss/router_embedding", stats), health_parts(query, passage)

    def generative_losses(self, params: Params, batch: GenerativeBatch) -> Metrics:
        """L_gen of the batch, and the balance loss of its experts; float32 scalars."""

        def on_device(params, batch):
            model = bind(self.model, params)

            def hidden_states(rows):
                x, segment_ids, positions = rows
                return model.hidden(x, model.mask(segment_ids, positions, causal=True), self.execution)

            # The tables of tokens are gathered once, outside the chunks.
            rows = (model.embed(batch.tokens, self.execution.dtype), batch.segment_ids, batch.positions)
            hidden, stats = map_chunks(hidden_states, rows, self.config.train.generative_chunks)
            # Tied together, the table's gradient leaves before the layers' backward pass begins, and frees its memory.
            hidden, table = jax.lax.optimization_barrier((hidden, model.output_table[...]))
            model.output_table[...] = table
            loss = next_token_loss(
                hidden.reshape(*batch.tokens.shape, -1),
                model.output_weights(self.execution.dtype),
                model.logits,
                targets=batch.targets,
                loss_weights=batch.loss_weights,
            )
            return _over_devices((loss[None], stats))

        in_axes = (param_axes(self.model), GenerativeBatch(*[_ROWS] * 5))
        split = on_devices(on_device, in_axes=in_axes, out_axes=(), over=mesh_axes("batch"))
        loss, stats = split(params, batch)
        return {"loss/generative": loss} | _balance("loss/router", stats)

    def losses(self, params: Params, batch: GritBatch) -> tuple[Metrics, Metrics]:
        """The losses of the streams that the batch holds, and the `health_parts` of its vectors.

        `loss/embedding` and `loss/generative`; with experts also `loss/router` and `loss/router_embedding`, the
        balance losses of the generative and of the embedding pass.
        """
        losses, health = {}, {}
        if batch.embedding is not None:
            losses, health = self.embedding_losses(params, batch.embedding)
        if batch.generative is not None:
            losses = losses | self.generative_losses(params, batch.generative)
        return losses, health

    def work(self, batch: GritBatch) -> Metrics:
        """What a batch asks for, padding left out: `tokens`, those of the generative stream, and visible pairs."""
        causal = {"embedding": self.config.model.embedding.attention == "causal", "generative": True}
        tokens, pairs = {}, {}
        for name, stream in batch._asdict().items():
            real = stream.segment_ids > 0 if stream is not None else jnp.zeros((), bool)
            earlier = jnp.sum(jnp.where(real, stream.positions, 0.0)) if stream is not None else 0.0
            tokens[name] = jnp.count_nonzero(real)
            pairs[name] = (1 if causal[name] else 2) * earlier + tokens[name]
        return {
            "tokens": sum(tokens.values()),
            "tokens/generative": tokens["generative"],
            "attention_pairs": sum(pairs.values()),
        }

    def __call__(self, params: Params, batch: GritBatch) -> tuple[jax.Array, Metrics]:
        """The weighted sum that is minimised; its parts, and the `health_parts` of the vectors."""
        losses, health = self.losses(params, batch)
        weights = {
            "loss/embedding": self.config.loss.embedding_weight,
            "loss/generative": self.config.loss.generative_weight,
            "loss/router": self.config.loss.router_weight,
            "loss/router_embedding": self.config.loss.embedding_router_weight,
        }
        weighted = [weights[name] * value for name, value in losses.items()]
        return jnp.sum(jnp.stack(weighted)), losses | health


def _by_trainable(objective: Objective, frozen: Params) -> Callable[[Params, GritBatch], tuple[jax.Array, Metrics]]:
    """The objective as a function of the trainable parameters and a batch."""
    return lambda trainable, batch: objective(merged(trainable, frozen), batch)


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state_shardings: TrainState,
) -> Callable[[TrainState, GritBatch], tuple[TrainState, Metrics]]:
    """Compiles `train_step(state, batch) -> (state, metrics)`; the old state's memory is reused.

    The loss is differentiated by what is trained alone, and frozen parameters come back as they are. An update is
    skipped where it, the loss or the gradient is not finite: parameters and optimizer state stay as they are, the
    schedule's count among them, and the step number alone goes on.

    Metrics are scalars: `loss`, the parts that are trained and their ratio, `grad_norm` (before clipping),
    `learning_rate` of this update, `skipped` (1 or 0), and the counts of `Objective.work`. Beside them are the
    `health_parts`. Every device holds them. Under `TOKEN_LOSSES` are the weighted losses and the weights of the
    generative tokens, float32 [2, rows, length], those of its own rows on each device: few steps' are wanted.
    """

    def value_and_gradient(state: TrainState, batch: GritBatch) -> tuple[tuple[jax.Array, Metrics], Params]:
        loss_of = _by_trainable(objective, state.frozen)
        if batch.generative is None or not objective.config.loss.generative_weight:
            return jax.value_and_grad(loss_of, has_aux=True)(state.trainable, batch)
        generative = batch.generative

        # The loss is linear in the tokens' weights: its derivatives by them are the tokens' losses.
        def weighted(trainable, loss_weights):
            return loss_of(trainable, batch._replace(generative=generative._replace(loss_weights=loss_weights)))

        differentiate = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)
        (loss, parts), (gradient, token_losses) = differentiate(state.trainable, generative.loss_weights)
        token_losses = token_losses * generative.loss_weights / objective.config.loss.generative_weight
        token_losses = jnp.stack([token_losses, generative.loss_weights])
        parts = parts | {TOKEN_LOSSES: constrain(token_losses, "whole", "batch", "length")}
        return (loss, parts), gradient

    def train_step(state: TrainState, batch: GritBatch) -> tuple[TrainState, Metrics]:
        (loss, parts), gradient = value_and_gradient(state, batch)
        norm = jnp.asarray(optax.tree.norm(gradient))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & _all_finite(updates)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trainable, opt_state), (state.trainable, state.opt_state)
        )
        metrics: Metrics = {"loss": loss, **parts}
        if batch.embedding is not None and batch.generative is not None:
            metrics["loss/ratio"] = parts["loss/embedding"] / parts["loss/generative"]
        metrics["grad_norm"] = norm
        metrics["learning_rate"] = jnp.asarray(schedule(updates_done(state.opt_state, otherwise=state.step)))
        metrics["skipped"] = 1.0 - finite
        metrics |= objective.work(batch)
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    # The metrics' shardings are as written above; a scalar has but one.
    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, None))


def make_gradient_norm(objective: Objective) -> Callable[[Params, Params, GritBatch], jax.Array]:
    """Compiles the norm of the weighted objective's gradient by the trainable parameters, given these and the frozen.

    Called with one stream of a batch at a time it tells how much each objective moves the shared weights. It needs one
    gradient's memory, as the train step does, and the time of that stream's share of a step.
    """

    def gradient_norm(trainable: Params, frozen: Params, batch: GritBatch) -> jax.Array:
        gradient, _ = jax.grad(_by_trainable(objective, frozen), has_aux=True)(trainable, batch)
        return jnp.asarray(optax.tree.norm(gradient))

    return jax.jit(gradient_norm)


def make_eval_step(objective: Objective) -> Callable[[Params, GritBatch], Metrics]:
    """Compiles the losses of a batch as sums over its weights, with those weights' sums under `weight/...`."""

    def eval_step(params: Params, batch: GritBatch) -> Metrics:
        sums, _ = objective.losses(params, batch)
        if batch.embedding is not None:
            sums["weight/embedding"] = jnp.sum(batch.embedding.query_weights)
        if batch.generative is not None:
            sums["weight/generative"] = jnp.sum(batch.generative.loss_weights)
        # A balance loss is one number per batch.
        routers = [name for name in sums if name.startswith("loss/router")]
        sums |= {name.replace("loss/", "weight/"): jnp.ones(()) for name in routers}
        return sums

    return jax.jit(eval_step)
