"""What every model class offers: parameters from scratch, from and to a checkpoint."""

from typing import TYPE_CHECKING, Any, ClassVar, Self

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from etils import epath
from jax.typing import DTypeLike

from mllama_jax.attention import AttentionKind
from mllama_jax.configs import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama_jax.execution import Execution, RematPolicy
from mllama_jax.quantisation import Quantisation, check_quantisation
from mllama_jax.shapes import Array
from mllama_jax.sharding import annotated

if TYPE_CHECKING:
    from mllama_jax.convert.table import Component

Params = dict[str, Any]
"""Nested dictionaries of arrays."""


class PretrainedModule(nn.Module):
    """Base of the public models. Modules hold no parameters: these go in with every call.

    Attributes:
      config: the model's configuration.
      dtype: of the computation.
      param_dtype: of parameters that `init_params` makes.
      hf_masked_rows: how a token is treated that may attend to no image tile. False (what the
        weights were trained with): cross-attention layers leave it unchanged. True (what
        transformers computes): it attends to all image tokens, and only the MLP is skipped.
      attention: a kind of `mllama_jax.attention`.
      remat: what the backward pass recomputes, one of `mllama_jax.execution.REMAT_POLICIES`.
      mesh: the devices that parameters and activations are split over (`mllama_jax.sharding`);
        None leaves it to where the arguments are.
      images_at_once: pictures that a device encodes at a time, None for all of a batch: fewer need
        less memory, above all in training.
    """

    config: MllamaConfig | MllamaTextConfig | MllamaVisionConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    hf_masked_rows: bool = False
    attention: AttentionKind = "xla"
    remat: RematPolicy = "none"
    mesh: jax.sharding.Mesh | None = None
    images_at_once: int | None = None
    quantise: Quantisation | None = None

    component: ClassVar["Component"]
    """The part of a full checkpoint that this class holds."""

    def __post_init__(self) -> None:
        # Named here, so that a wrong name is an error where it was given.
        _ = self.execution
        check_quantisation(self.quantise)
        super().__post_init__()

    @property
    def execution(self) -> Execution:
        """What its layers are told beside the configuration."""
        return Execution(self.dtype, self.param_dtype, self.attention, self.remat, self.mesh)

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments that a part of this module shares with it."""
        return {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "hf_masked_rows": self.hf_masked_rows,
            "attention": self.attention,
            "remat": self.remat,
            "mesh": self.mesh,
            "images_at_once": self.images_at_once,
            "quantise": self.quantise,
        }

    @nn.nowrap
    def dummy_inputs(self) -> dict[str, Array]:
        """The smallest inputs that touch every parameter."""
        raise NotImplementedError

    @nn.nowrap
    def init_params(self, key: jax.Array) -> Params:
        """Randomly initialised parameters, in ``param_dtype``.

        Raises:
          ValueError: the model is quantised.
        """
        if self.quantise is not None:
            raise ValueError(
                f"quantise={self.quantise!r}: quantised parameters are only loaded, with "
                "from_pretrained"
            )
        inputs: Any = self.dummy_inputs()

        # Compiled, because only the random numbers are then computed, not the model's output.
        @jax.jit
        def init(key: jax.Array) -> Params:
            return nn.unbox(self.init(key, **inputs)["params"])

        return init(key)

    @nn.nowrap
    def param_shapes(self) -> Params:
        """Shapes and dtypes of the parameters (`jax.ShapeDtypeStruct`), without making any."""
        leaves = {path: leaf for path, (_, leaf) in annotated(self).items()}
        return flax.traverse_util.unflatten_dict(leaves)

    @classmethod
    def from_pretrained(
        cls,
        path: epath.PathLike,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        mesh: jax.sharding.Mesh | str | None = None,
        hf_masked_rows: bool = False,
        attention: AttentionKind = "xla",
        remat: RematPolicy = "none",
        quantise: Quantisation | None = None,
        revision: str | None = None,
    ) -> tuple[Self, Params]:
        """Loads a checkpoint; a part's class takes its own part out of a full one.

        Every process reads the regions that its own devices hold and casts them on the way: no
        process ever has a whole tensor of which its devices hold a part.

        Args:
          path: a folder, local or cloud, or a hub id: a Hugging Face folder (``config.json`` and
            safetensors or ``pytorch_model*.bin``), Meta's release (``params.json`` and
            ``consolidated*.pth``), an Orbax checkpoint that this package wrote, or a LoRA adapter
            of PEFT (merged into the base that it names).
          dtype: of the computation, an array dtype or its name.
          param_dtype: of the loaded parameters; ``dtype`` if None.
          mesh: devices of all processes to split parameters and computation over, also in its
            written form, such as ``"fsdp=8,tensor=2"`` (`mllama_jax.sharding.parse_mesh`); the
            default device if None. Its axes are some of ``data`` (every group of devices along it
            holds all parameters), ``fsdp`` (splits every matrix on its hidden size) and ``tensor``
            (splits heads, feed-forward width and vocabulary).
          hf_masked_rows, attention, remat: see the class.
          quantise: ``"int8"``, ``"int4"`` or ``"nf4"`` stores the decoder layers' kernels so, and
            computes with what they stand for (`mllama_jax.quantisation`); all other parameters
            stay as they are. They are the same on every mesh.
          revision: of a hub id.

        Returns:
          The module and its parameters, nested dictionaries of arrays.

        Raises:
          FileNotFoundError: the folder or a file of it does not exist.
          ValueError: the configuration is unusable; tensors are missing, unexpected or misshaped
            (all of them are named); the mesh has other axes, or sizes that do not divide the
            parameters (named too); weights that can't be quantised.
        """
        from mllama_jax.convert.load import load_pretrained

        return load_pretrained(
            cls,
            path,
            dtype=dtype,
            param_dtype=param_dtype,
            mesh=mesh,
            hf_masked_rows=hf_masked_rows,
            attention=attention,
            remat=remat,
            quantise=quantise,
            revision=revision,
        )

    @nn.nowrap
    def save_pretrained(
        self, params: Params, folder: epath.PathLike, *, max_shard_size: str = "5GB"
    ) -> None:
        """Writes ``params`` as a Hugging Face folder (Hub key layout) that transformers loads.

        Args:
          params: this model's parameters, on any devices of this process.
          folder: made if absent.
          max_shard_size: tensors are split into files of at most this size.

        Raises:
          ValueError: these are not this model's parameters (all differences are named), or other
            processes' devices hold a part of them; they are quantised.
        """
        if self.quantise is not None:
            raise ValueError(
                f"quantise={self.quantise!r}: quantised parameters are not saved; save the "
                "unquantised ones, and give quantise when they are loaded"
            )
        from mllama_jax.convert.save import save_params

        save_params(
            params,
            self.config,
            folder,
            component=self.component,
            max_shard_size=max_shard_size,
        )
