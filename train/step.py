"""One training step: loss, gradients, AdamW. Pure functions over one state."""

from functools import partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mllama_jax.loss import IGNORED_LABEL
from mllama_jax.outputs import CausalLMOutputWithPast
from mllama_jax.pretrained import Params, PretrainedModule
from mllama_jax.shapes import Array
from mllama_jax.train.config import OptimizerConfig

Batch = dict[str, Array]
Metrics = dict[str, Array]


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step on the device.

    ``step`` counts the updates made (int32 scalar); ``rng`` is a key that steps draw from.
    """

    step: Array
    params: Params
    opt_state: optax.OptState
    rng: Array


def init_state(params: Params, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        rng=jax.random.key(seed),
    )


def learning_rates(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then a cosine down to ``final_fraction`` of it."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.learning_rate * config.final_fraction,
    )


def decayed(params: Params) -> Params:
    """True for the parameters under weight decay: kernels.

    Norms, biases, gates and embeddings (token, class, position and tile) are left alone.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rates(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


@partial(jax.jit, static_argnames=("model", "config", "steps"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: PretrainedModule,
    config: OptimizerConfig,
    steps: int,
) -> tuple[TrainState, Metrics]:
    """One update; the given state's memory is taken over.

    Args:
        state: before the step.
        batch: the model's inputs and ``labels`` (B, T), -100 where nothing is learned.
        model, config, steps: the model, and what `make_optimizer` is given.

    Returns:
        The state after the step, and scalars: ``loss``, the mean over the labels that count;
        ``labels``, their number (int32); ``grad_norm``, the global norm before clipping;
        ``learning_rate``, what this step used.
    """

    def loss_of(params: Params) -> Array:
        inputs: Any = batch  # none of them is one of apply's own arguments
        output = model.apply({"params": params}, **inputs, use_cache=False)
        loss = cast(CausalLMOutputWithPast, output).loss
        assert loss is not None  # a batch has labels
        return loss

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = make_optimizer(config, steps).update(grads, state.opt_state, state.params)
    metrics = {
        "loss": loss,
        # The first token has no predecessor to be predicted from.
        "labels": (batch["labels"][:, 1:] != IGNORED_LABEL).sum(),
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(learning_rates(config, steps)(state.step), jnp.float32),
    }
    new_state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        rng=state.rng,
    )
    return new_state, metrics
