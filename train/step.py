"""One training step: loss, gradients, update. Pure functions over one state."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllama_jax.pretrained import Params, PretrainedModule
from mllama_jax.shapes import Array
from mllama_jax.sharding import constrain, num_parts, param_shardings
from mllama_jax.train.compiler_options import compiler_options
from mllama_jax.train.components import joined, split
from mllama_jax.train.lora import adapter_shardings, init_adapters, scaled
from mllama_jax.train.optimizers import learning_rates, make_optimizer
from mllama_jax.train.settings import Recipe

Batch = dict[str, Array]
Metrics = dict[str, Array]


@flax.struct.dataclass
class TrainState:
    """All that changes from step to step on the device.

    ``step`` counts the steps (int32 scalar), ``skipped`` those of them that changed nothing;
    ``params`` are those that are trained, of the model and of adapters beside them; ``rng`` is a
    key that steps draw from.
    """

    step: Array
    params: Params
    opt_state: optax.OptState
    rng: Array
    skipped: Array


def start(
    model: PretrainedModule, params: Params, recipe: Recipe, seed: int
) -> tuple[TrainState, Params]:
    """The state before the first step, and the parameters that stay as they are.

    The state holds the given arrays themselves, not copies of them: the first step takes their
    memory over.

    Raises:
        ValueError: what the recipe names to be trained can't be.
    """
    trained, frozen = split(model, params, recipe.trained)
    adapters = init_adapters(model, recipe, jax.random.key(seed))
    optimizer = make_optimizer(model, recipe)
    return init_state(joined(trained, adapters), optimizer, seed, model.mesh), frozen


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
    return TrainState(step, params, opt_state, rng, skipped=jnp.zeros_like(step))


def placed_like(tree: Any, params: Params) -> Any:
    """Shapes of a tree that holds copies of the parameters' tree, placed as the parameters are.

    Args:
        tree: of `jax.ShapeDtypeStruct`, such as an optimizer's state; what belongs to no parameter
            is whole on every device, and so are sums over a parameter's rows or columns.
        params: arrays, or shapes, with shardings on one mesh.
    """
    places = {
        jax.tree_util.keystr(path): (leaf.shape, leaf.sharding)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    mesh = next(iter(places.values()))[1].mesh
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path)
        shape, sharding = next((p for end, p in places.items() if name.endswith(end)), ((), whole))
        sharding = sharding if shape == leaf.shape else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, tree)


_jit = partial(jax.jit, static_argnames=("model", "recipe"), donate_argnames="state")


@_jit
def train_step(
    state: TrainState, batch: Batch, frozen: Params, *, model: PretrainedModule, recipe: Recipe
) -> tuple[TrainState, Metrics]:
    """One update; the given state's memory is taken over.

    If loss or gradients are not finite, or no label counts, nothing changes but ``state.step``
    and ``state.skipped``.

    Args:
        state: before the step.
        batch: the model's inputs and ``labels`` (B, T), -100 where nothing is learned.
        frozen: the parameters that are not in ``state.params``; they may be quantised.
        model, recipe: the model, and what is done with it.

    Returns:
        The state after the step, and scalars: ``loss``, the mean over the labels that count, 0 if
        none does; ``labels``, their number (int32); ``grad_norm``, the global norm before
        clipping; ``learning_rate``, what this step used; ``skipped``, 1 if it changed nothing
        (int32).

    Raises:
        ValueError: the batch can't be divided into microbatches.
    """
    places = _places(model, recipe, state.params)
    (loss, count), grads = _mean_loss_and_gradients(
        _as_computed(state.params, model), batch, frozen, model, recipe
    )
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), _placed(grads, places))
    updates, opt_state = make_optimizer(model, recipe).update(grads, state.opt_state, state.params)
    params = _placed(optax.apply_updates(state.params, updates), places)
    norm = optax.tree.norm(grads)
    is_kept = jnp.isfinite(loss) & jnp.isfinite(norm) & (count > 0)
    skipped = 1 - is_kept.astype(jnp.int32)
    rates = learning_rates(recipe.optimizer, recipe.steps)
    metrics = {
        "loss": loss,
        "labels": count,
        "grad_norm": norm,
        "learning_rate": jnp.asarray(rates(state.step - state.skipped), jnp.float32),
        "skipped": skipped,
    }

    def kept(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda new, old: jnp.where(is_kept, new, old), new, old)

    new_state = TrainState(
        step=state.step + 1,
        params=kept(params, state.params),
        opt_state=kept(opt_state, state.opt_state),
        rng=state.rng,
        skipped=state.skipped + skipped,
    )
    return new_state, metrics


@cache
def train_step_on(device_kind: str) -> Callable[..., tuple[TrainState, Metrics]]:
    """`train_step`, compiled as devices of this kind (`jax.Device.device_kind`) do best with it."""
    options = compiler_options(device_kind)
    step: Any = train_step  # of which there is one only, wherever its compiler needs no options
    return _jit(step.__wrapped__, compiler_options=dict(options)) if options else step


def _mean_loss_and_gradients(
    params: Params, batch: Batch, frozen: Params, model: PretrainedModule, recipe: Recipe
) -> tuple[tuple[Array, Array], Params]:
    """((mean loss, number of labels), gradients of the mean); without labels all are 0."""
    z_loss = recipe.optimizer.z_loss

    def summed(params: Params, part: Batch) -> tuple[Array, Array]:
        variables = {"params": joined(frozen, scaled(params, recipe.lora))}
        inputs: Any = part  # none of them is one of apply's own arguments
        if z_loss:
            inputs = {**part, "z_loss": z_loss}
        return cast(Any, model.apply(variables, **inputs, method="loss"))

    def mean(params: Params) -> tuple[Array, Array]:
        total, count = summed(params, batch)
        return total / jnp.maximum(count, 1), count

    parts = recipe.optimizer.microbatches
    if parts == 1:
        return jax.value_and_grad(mean, has_aux=True)(params)

    def add(so_far: Any, part: Batch) -> tuple[Any, None]:
        (total, count), grads = jax.value_and_grad(summed, has_aux=True)(params, part)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return jax.tree.map(jnp.add, so_far, ((total, count), grads)), None

    nothing = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    zeros = _placed(zeros, _places(model, recipe, params))
    divided = {name: _in_parts(x, parts, model) for name, x in batch.items()}
    ((total, count), grads), _ = jax.lax.scan(add, (nothing, zeros), divided)
    number = jnp.maximum(count, 1)
    return (total / number, count), jax.tree.map(lambda g: g / number, grads)


def _in_parts(x: Array, parts: int, model: PretrainedModule) -> Array:
    """(B, …) to (parts, B / parts, …); each device's samples are divided, none moves."""
    shards = num_parts("batch", len(x), model.mesh)
    if len(x) % (shards * parts):
        raise ValueError(
            f"a batch of {len(x)} can't be divided into optimizer.microbatches={parts} on {shards} "
            f"groups of devices: expected a multiple of {shards * parts}"
        )
    x = jnp.asarray(x).reshape(shards, parts, -1, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 0).reshape(parts, -1, *x.shape[3:])
    return constrain(x, model.mesh, None, "batch", *[None] * (x.ndim - 2))


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


def _places(model: PretrainedModule, recipe: Recipe, params: Params) -> Any:
    """Where the trained parameters lie: a sharding for each, None without a mesh."""
    if model.mesh is None:
        return None
    of_model = param_shardings(model, model.mesh)
    known = flax.traverse_util.flatten_dict(joined(of_model, adapter_shardings(model, recipe)))
    paths = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict({path: known[path] for path in paths})


def _placed(tree: Any, places: Any) -> Any:
    return tree if places is None else jax.lax.with_sharding_constraint(tree, places)
