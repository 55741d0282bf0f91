"""The model's components: which parameters belong to which, and how they are trained."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from mllama_jax.configs import MllamaTextConfig
from mllama_jax.pretrained import Params, PretrainedModule
from mllama_jax.text import DecoderModule
from mllama_jax.train.settings import COMPONENTS, TrainedConfig

Path = tuple[str, ...]

_OF_GLOBAL = ("layernorm_post", "post_tile_positional_embedding", "global_transformer")

_GATES = ("gate", "gate_attn", "gate_ffn", "cross_attn_attn_gate", "cross_attn_mlp_gate")


def component_of(model: PretrainedModule, path: Path) -> str:
    """The component of a parameter or projection, by its path in the tree of a whole model."""
    if path[0] == "multi_modal_projector":
        return "projector"
    if path[0] == "vision_model":
        if is_gate(path):
            return "vision_gates"
        return "vision_global" if path[1] in _OF_GLOBAL else "vision_local"
    if path[:3] == ("language_model", "model", "embed_tokens"):
        return "embeddings"
    if path[:3] != ("language_model", "model", "layers"):
        return "head"
    if is_gate(path):
        return "gates"
    block = int(path[3].removeprefix("block_"))
    is_cross = _text_config(model).is_cross_attention_layer(block)
    return "cross_attention" if is_cross else "self_attention"


def is_gate(path: Path) -> bool:
    """Whether a parameter is a gate, of a layer or of an embedding."""
    return path[-1] in _GATES


def is_adapter(path: Path) -> bool:
    """Whether it is one of an adapter's two matrices."""
    return path[-1] in ("a", "b")


def split(model: PretrainedModule, params: Params, config: TrainedConfig) -> tuple[Params, Params]:
    """The parameters that are trained themselves, and the others.

    Works on arrays and on shapes (`jax.ShapeDtypeStruct`).

    Returns:
        Two trees that have no leaf in common. Gates to be trained are float32.

    Raises:
        ValueError: quantised parameters are to be trained.
    """
    modes = config.modes
    trained: dict[Path, Any] = {}
    frozen: dict[Path, Any] = {}
    refused = set()
    for path, leaf in flatten_dict(params).items():
        component = component_of(model, path)
        is_trained = modes[component] == "full"
        if is_trained and jnp.issubdtype(leaf.dtype, jnp.integer):
            refused.add(component)
        (trained if is_trained else frozen)[path] = leaf
    if refused:
        raise ValueError(
            f"model.quantise stores {', '.join(sorted(refused))} in few bits, which can't be "
            f"trained: give {'it' if len(refused) == 1 else 'them'} mode lora or frozen (as the "
            "preset lora does), or leave out model.quantise"
        )
    return unflatten_dict(_with_exact_gates(trained)), unflatten_dict(frozen)


def _with_exact_gates(params: dict[Path, Any]) -> dict[Path, Any]:
    """Gates are single numbers near zero that a step moves by little: bfloat16 would lose that."""
    gates = {
        path: leaf for path, leaf in params.items() if is_gate(path) and leaf.dtype != jnp.float32
    }
    if any(isinstance(leaf, jax.Array) for leaf in gates.values()):
        places = {path: leaf.sharding for path, leaf in gates.items()}
        cast = jax.jit(
            lambda leaves: [leaf.astype(jnp.float32) for leaf in leaves],
            out_shardings=[*places.values()],
        )
        return params | dict(zip(gates, cast([*gates.values()]), strict=True))
    return params | {path: leaf.update(dtype=jnp.float32) for path, leaf in gates.items()}


def joined(*trees: Params) -> Params:
    """One tree with the leaves of several, which have none in common."""
    flat: dict[Path, Any] = {}
    for tree in trees:
        flat |= flatten_dict(tree)
    return unflatten_dict(flat)


def describe_trained(model: PretrainedModule, trained: Params, frozen: Params) -> str:
    """A line for each component: its parameters, and how many of them are trained in which way.

    Raises:
        ValueError: nothing is trained.
    """
    if not jax.tree.leaves(trained):
        raise ValueError(
            "nothing is trained: all components are frozen; give trained.preset, or a component's "
            "mode, such as trained.projector.mode=full"
        )
    return "\n".join(_lines(model, trained, frozen))


def rounding_warning(trained: Params, learning_rate: float) -> str | None:
    """What is lost where trained parameters have too few bits for their steps; None if nothing is.

    Args:
        trained: parameters and adapters.
        learning_rate: about the size of AdamW's steps.
    """
    coarse = [leaf for leaf in jax.tree.leaves(trained) if leaf.dtype != jnp.float32]
    if not coarse:
        return None
    step = float(jnp.finfo(coarse[0].dtype).eps) / 2
    return (
        f"Warning: {sum(leaf.size for leaf in coarse):,} trained parameters are "
        f"{coarse[0].dtype}. A step is rounded away where it is less than about {step:.1g} of its "
        f"parameter; with optimizer.learning_rate={learning_rate:g}, where a parameter is above "
        f"{learning_rate / step:.1g}. model.param_dtype=float32 loses none."
    )


def _lines(model: PretrainedModule, trained: Params, frozen: Params) -> Iterator[str]:
    counts = {name: dict.fromkeys(("frozen", "lora", "full"), 0) for name in COMPONENTS}
    for tree, mode in ((trained, "full"), (frozen, "frozen")):
        for path, leaf in flatten_dict(tree).items():
            found = "lora" if is_adapter(path) else mode
            counts[component_of(model, path)][found] += leaf.size
    total = {mode: sum(count[mode] for count in counts.values()) for mode in counts["head"]}
    rows: Mapping[str, Mapping[str, int]] = {**counts, "all": total}
    width = max(map(len, rows))
    size = max(len("frozen"), *(len(f"{n:,}") for row in rows.values() for n in row.values()))
    yield f"{'parameters':<{width}}" + "".join(f"  {mode:>{size}}" for mode in total)
    for name, row in rows.items():
        cells = (f"{count:,}" if count else "-" for count in row.values())
        yield f"{name:<{width}}" + "".join(f"  {cell:>{size}}" for cell in cells)


def _text_config(model: PretrainedModule) -> MllamaTextConfig:
    if not isinstance(model, DecoderModule):
        raise TypeError(f"{type(model).__name__} has no decoder")
    return model.text_config
