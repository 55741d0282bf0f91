"""One training step: loss, gradients, AdamW. Pure functions over one state."""

from functools import partial
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllama_jax.pretrained import Params, PretrainedModule
from mllama_jax.shapes import Array
from mllama_jax.sharding import param_shardings
from mllama_jax.train.config import LoraConfig, OptimizerConfig
from mllama_jax.train.lora import adapter_shardings, collection

Batch = dict[str, Array]
Metrics = dict[str, Array]


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step on the device.

    ``step`` counts the updates made (int32 scalar); ``params`` are those that are trained: the
    model's, or adapters; ``rng`` is a key that steps draw from.
    """

    step: Array
    params: Params
    opt_state: optax.OptState
    rng: Array


def init_state(
    params: Params, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh | None = None
) -> TrainState:
    """The state before the first step; the optimizer's lies where the parameters do."""

    def make(params: Params) -> tuple[Array, optax.OptState, Array]:
        return jnp.zeros((), jnp.int32), optimizer.init(params), jax.random.key(seed)

    shardings = None
    if mesh is not None:
        shardings = jax.tree.map(
            lambda x: x.sharding, placed_like(jax.eval_shape(make, params), params)
        )
    step, opt_state, rng = jax.jit(make, out_shardings=shardings)(params)
    return TrainState(step=step, params=params, opt_state=opt_state, rng=rng)


def placed_like(tree: Any, params: Params) -> Any:
    """Shapes of a tree that holds copies of the parameters' tree, placed as the parameters are.

    Args:
        tree: of `jax.ShapeDtypeStruct`, such as an optimizer's state; what belongs to no parameter
            is whole on every device.
        params: arrays, or shapes, with shardings on one mesh.
    """
    places = {
        jax.tree_util.keystr(path): leaf.sharding
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    whole = NamedSharding(next(iter(places.values())).mesh, PartitionSpec())

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path)
        sharding = next((s for end, s in places.items() if name.endswith(end)), whole)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, tree)


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
    """True for the parameters under weight decay: kernels and adapters.

    Norms, biases, gates and embeddings (token, class, position and tile) are left alone.
    """
    return jax.tree.map_with_path(lambda path, _: path[-1].key in ("kernel", "a", "b"), params)


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


@partial(jax.jit, static_argnames=("model", "config", "steps", "lora"), donate_argnames="state")
def train_step(
    state: TrainState,
    batch: Batch,
    frozen: Params | None = None,
    *,
    model: PretrainedModule,
    config: OptimizerConfig,
    steps: int,
    lora: LoraConfig | None = None,
) -> tuple[TrainState, Metrics]:
    """One update; the given state's memory is taken over.

    Args:
        state: before the step.
        batch: the model's inputs and ``labels`` (B, T), -100 where nothing is learned.
        frozen: the model's parameters, where adapters are trained.
        model, config, steps: the model, and what `make_optimizer` is given.
        lora: of the adapters in ``state.params``; None trains the model's parameters.

    Returns:
        The state after the step, and scalars: ``loss``, the mean over the labels that count;
        ``labels``, their number (int32); ``grad_norm``, the global norm before clipping;
        ``learning_rate``, what this step used.
    """

    def loss_of(params: Params) -> tuple[Array, Array]:
        if lora is None:
            variables: dict[str, Any] = {"params": params}
        else:
            variables = {"params": frozen, "lora": collection(params, lora)}
        inputs: Any = batch  # none of them is one of apply's own arguments
        total, count = cast(Any, model.apply(variables, **inputs, method="loss"))
        return total / count, count

    computed = state.params if lora else _as_computed(state.params, model)
    (loss, count), grads = jax.value_and_grad(loss_of, has_aux=True)(computed)
    places = _places(model, lora)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), _placed(grads, places), state.params)
    updates, opt_state = make_optimizer(config, steps).update(grads, state.opt_state, state.params)
    metrics = {
        "loss": loss,
        "labels": count,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(learning_rates(config, steps)(state.step), jnp.float32),
    }
    new_state = TrainState(
        step=state.step + 1,
        params=_placed(optax.apply_updates(state.params, updates), places),
        opt_state=opt_state,
        rng=state.rng,
    )
    return new_state, metrics


def _as_computed(params: Params, model: PretrainedModule) -> Params:
    """Parameters of which the layers' matrices are what the layers would cast them to.

    Their gradients then take that dtype's memory; they are no less exact, as each comes from one
    product in that dtype. Those that are sums, over the head's chunks and over the turns of
    pictures, are made in the parameters' own dtype.
    """
    summed = {"lm_head"}
    if model.images_at_once is not None:
        summed |= {"vision_model", "multi_modal_projector"}

    def cast(path: Any, leaf: Array) -> Array:
        names = [key.key for key in path]
        is_cast = names[-1] == "kernel" and summed.isdisjoint(names)
        return leaf.astype(model.dtype) if is_cast else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _places(model: PretrainedModule, lora: LoraConfig | None) -> Any:
    """Where the trained parameters lie: a sharding for each, None without a mesh."""
    if model.mesh is None:
        return None
    return param_shardings(model, model.mesh) if lora is None else adapter_shardings(model, lora)


def _placed(tree: Any, places: Any) -> Any:
    return tree if places is None else jax.lax.with_sharding_constraint(tree, places)
