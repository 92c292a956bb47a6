"""One update: the losses of all streams, their gradient and the optimizer, in one compiled function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grit_jax.config import CompilerOption
from grit_jax.data.batch import Batch
from grit_jax.losses.balance import balance_loss
from grit_jax.model.lora import token_noise
from grit_jax.model.moe import RouterStats
from grit_jax.model.transformer import Params, Transformer, bind, param_axes
from grit_jax.parallel.execution import Execution, map_chunks
from grit_jax.parallel.sharding import mesh_axes, on_devices, split_axes
from grit_jax.train.objectives.objective import Losses, Metrics, Objective, Parts
from grit_jax.train.optimizer import updates_done
from grit_jax.train.state import TrainState, merged

TOKEN_LOSSES = "tokens/"  # prefix of the names of `Losses.of_tokens` among a step's metrics

_ROWS = ("batch", "length")


def _over_devices(chunks: Any) -> Any:
    """Sums over the first dim of every array, and over the devices that hold the batch."""
    return jax.tree.map(lambda x: jax.lax.psum(jnp.sum(x, axis=0), split_axes("batch")), chunks)


@dataclasses.dataclass(frozen=True)
class JointObjective:
    """The weighted sum of all objectives as a function of a model's parameters and a batch.

    Attributes:
      model: Abstract model; parameters are bound to it in every call.
      objectives: One for each trained stream.
      execution: How the model computes.
      dropout_seed: Seed of the adapters' dropout; None if they have none.
    """

    model: Transformer
    objectives: Sequence[Objective]
    execution: Execution
    dropout_seed: int | None = None

    def stream_losses(
        self, objective: Objective, params: Params, batch: Any, step: Any = None
    ) -> tuple[Losses, RouterStats | None]:
        """The losses of one stream's batch, and the sums of its routers; arguments as in `losses`."""
        seed = None if step is None else self.dropout_seed
        step = None if seed is None else step

        def on_device(params, batch, step):
            model = bind(self.model, params)
            tokens, segment_ids, positions, extras = objective.inputs(batch)
            noise = None if seed is None else token_noise(tokens, segment_ids, positions, seed=seed, step=step)

            def kept(rows):
                x, segment_ids, positions, extras, noise = rows
                mask = model.mask(segment_ids, positions, causal=objective.causal)
                hidden, stats = model.hidden(x, mask, self.execution, noise)
                return objective.kept(model, hidden, segment_ids, extras), stats

            # The token table is gathered once, outside the chunks.
            rows = (model.embed(tokens, self.execution.dtype), segment_ids, positions, extras, noise)
            pieces, stats = map_chunks(kept, rows, objective.stream.num_chunks)
            whole = pieces.reshape(len(tokens), *pieces.shape[2:])
            split, sums = objective.parts(model, whole, batch, self.execution.dtype)
            return Parts(split, _over_devices((sums, stats)))

        fields = type(batch)(*(_ROWS if field in batch.per_row else ("whole",) for field in batch._fields))
        split = on_devices(
            on_device,
            in_axes=(param_axes(self.model), fields, ()),
            out_axes=Parts(objective.split_axes, ()),
            over=mesh_axes("batch"),
        )
        split, (sums, stats) = split(params, batch, step)
        return objective.losses(split, sums, batch), stats

    def losses(self, params: Params, batch: Batch, step: Any = None) -> tuple[Metrics, Metrics]:
        """The losses of the batch's streams, and further measurements.

        `step` is the number of the training step, int32, of whose dropout the losses are; None is without dropout.
        Losses are `loss/STREAM` and, with experts, the balance losses `loss/router` (generative) or
        `loss/router_STREAM`. Measurements include the losses of a stream's tokens as `tokens/STREAM`.
        """
        losses, measured = {}, {}
        for objective in self._of(batch):
            found, stats = self.stream_losses(objective, params, batch[objective.name], step)
            losses[f"loss/{objective.name}"] = found.loss
            if stats is not None:
                losses[objective.router_metric] = balance_loss(*stats)
            measured |= found.metrics
            if found.of_tokens is not None:
                measured[f"{TOKEN_LOSSES}{objective.name}"] = found.of_tokens
        return losses, measured

    def work(self, batch: Batch) -> Metrics:
        """A batch's work without padding: `tokens`, `tokens_through_head` and visible `attention_pairs`."""
        tokens, through_head, pairs = jnp.zeros((), int), jnp.zeros((), int), jnp.zeros(())
        for objective in self._of(batch):
            inputs = objective.inputs(batch[objective.name])
            real = inputs.segment_ids > 0
            earlier, count = jnp.sum(jnp.where(real, inputs.positions, 0.0)), jnp.count_nonzero(real)
            tokens, pairs = tokens + count, pairs + (1 if objective.causal else 2) * earlier + count
            through_head += count if objective.uses_head else 0
        return {"tokens": tokens, "tokens_through_head": through_head, "attention_pairs": pairs}

    def __call__(self, params: Params, batch: Batch, step: Any = None) -> tuple[jax.Array, Metrics]:
        """The minimised sum; its parts and further measurements. Arguments as in `losses`."""
        losses, measured = self.losses(params, batch, step)
        weights = {f"loss/{objective.name}": objective.weight for objective in self.objectives}
        weights |= {objective.router_metric: objective.router_weight for objective in self.objectives}
        weighted = [weights[name] * value for name, value in losses.items()]
        return jnp.sum(jnp.stack(weighted)), losses | measured

    def weights(self, batch: Batch) -> Metrics:
        """The total weight of each loss of a batch, by the loss's name."""
        found = {}
        for objective in self._of(batch):
            found[f"loss/{objective.name}"] = objective.total_weight(batch[objective.name])
            found[objective.router_metric] = jnp.ones(())  # a balance loss is one number per batch
        return found

    @property
    def names(self) -> list[str]:
        """Names of the streams, in their order."""
        return [objective.name for objective in self.objectives]

    def _of(self, batch: Batch) -> list[Objective]:
        """The objectives of the streams that a batch holds."""
        return [objective for objective in self.objectives if objective.name in batch]


def _by_trainable(
    objective: JointObjective, frozen: Params, step: Any = None
) -> Callable[[Params, Batch], tuple[jax.Array, Metrics]]:
    """The objective as a function of the trainable parameters and a batch."""
    return lambda trainable, batch: objective(merged(trainable, frozen), batch, step)


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def make_train_step(
    objective: JointObjective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state_shardings: TrainState,
    *,
    compiler_options: dict[str, CompilerOption] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compiles `train_step(state, batch) -> (state, metrics)`, with XLA's options; the old state's memory is reused.

    Only trained parameters are differentiated; frozen ones are returned unchanged. Where the loss, the gradient or the
    update is not finite, the update is skipped: parameters and optimizer state stay, including the schedule's count,
    and only the step number advances.

    Metrics are the scalars `loss`, its parts, the ratio of the first two streams' losses, `grad_norm` (before
    clipping), `learning_rate` of this update, `skipped` (1 or 0) and the counts of `JointObjective.work`, and the
    objectives' measurements. They are replicated, except the rarely needed tokens' losses, float32 [2, rows, length].
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        differentiate = jax.value_and_grad(_by_trainable(objective, state.frozen, state.step), has_aux=True)
        (loss, parts), gradient = differentiate(state.trainable, batch)
        norm = jnp.asarray(optax.tree.norm(gradient))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & _all_finite(updates)
        trainable = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trainable, opt_state), (state.trainable, state.opt_state)
        )
        metrics: Metrics = {"loss": loss, **parts}
        if len(batch) > 1:
            first, second, *_ = (parts[f"loss/{name}"] for name in objective.names)
            metrics["loss/ratio"] = first / second
        metrics["grad_norm"] = norm
        metrics["learning_rate"] = jnp.asarray(schedule(updates_done(state.opt_state, otherwise=state.step)))
        metrics["skipped"] = 1.0 - finite
        metrics |= objective.work(batch)
        return TrainState(state.step + 1, trainable, state.frozen, opt_state), metrics

    # None leaves the metrics' shardings as they are computed; a scalar has only one.
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(state_shardings, None), compiler_options=compiler_options
    )


def make_gradient_norm(objective: JointObjective) -> Callable[[Params, Params, Batch], jax.Array]:
    """Compiles `gradient_norm(trainable, frozen, batch)` of the weighted objective.

    Given one stream of a batch, it shows how strongly that objective moves the shared weights, with one gradient's
    memory and that stream's share of a step's time. It is measured without dropout.
    """

    def gradient_norm(trainable: Params, frozen: Params, batch: Batch) -> jax.Array:
        gradient, _ = jax.grad(_by_trainable(objective, frozen), has_aux=True)(trainable, batch)
        return jnp.asarray(optax.tree.norm(gradient))

    return jax.jit(gradient_norm)


def make_eval_step(objective: JointObjective) -> Callable[[Params, Batch], tuple[Metrics, Metrics]]:
    """Compiles the weighted sums of a batch's losses, and the weights' sums, under the same names."""

    def eval_step(params: Params, batch: Batch) -> tuple[Metrics, Metrics]:
        losses, _ = objective.losses(params, batch)
        weights = objective.weights(batch)
        return losses, {name: weights[name] for name in losses}

    return jax.jit(eval_step)
