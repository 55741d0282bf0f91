"""How a model is computed: what changes speed and memory, and of what comes out the precision."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from mllama_jax.attention import ATTENTION_RESULT, AttentionKind, check_attention_kind
from mllama_jax.quantisation import Quantisation, check_quantisation
from mllama_jax.sharding import check_mesh

RematPolicy = Literal["none", "dots", "attention", "full"]

REMAT_POLICIES: Mapping[RematPolicy, str] = {
    "none": "every activation is kept: fastest, most memory",
    "dots": "the results of all matrix products with weights are kept, the rest is recomputed",
    "attention": "each layer's input and the result of its attention are kept",
    "full": "only each layer's input is kept: one more forward pass, least memory",
}
"""What the backward pass finds in memory, and what it computes once more."""

_SAVED: dict[str, Callable[..., bool] | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_RESULT),
    "full": None,
}


@dataclass(frozen=True)
class Execution:
    """What the layers are told beside the model's configuration.

    Attributes:
      dtype: of the computation.
      param_dtype: of new parameters.
      attention: a kind of `mllama_jax.attention`.
      remat: one of `REMAT_POLICIES`.
      mesh: devices that activations are split over; None leaves it to where the arguments are.
      quantise: how the weights of projections are stored; only the decoder's layers are told one.

    Raises:
      ValueError: a name or the mesh's axes are unknown.
    """

    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    attention: AttentionKind = "xla"
    remat: RematPolicy = "none"
    mesh: Mesh | None = None
    quantise: Quantisation | None = None

    def __post_init__(self) -> None:
        check_attention_kind(self.attention)
        check_quantisation(self.quantise)
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r}: expected one of {', '.join(REMAT_POLICIES)}")
        if self.mesh is not None:
            check_mesh(self.mesh)

    def rematerialised(self, layer: Any, static_argnums: tuple[int, ...] = ()) -> Any:
        """A module class, or a function of a module, whose backward pass follows ``remat``."""
        if self.remat == "none":
            return layer
        policy = _SAVED[self.remat]
        return nn.remat(layer, prevent_cse=False, policy=policy, static_argnums=static_argnums)
