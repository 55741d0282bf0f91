"""Options that several commands have, and what is said about them."""

import sys
from typing import Any, Literal

# Said here a second time, so that --help need not load JAX.
Attention = Literal["xla", "splash", "cudnn", "reference"]
Dtype = Literal["float32", "bfloat16", "float16"]
Quantise = Literal["int8", "int4", "nf4"]


def print_choices(model: Any) -> None:
    """Says on standard error, once a job, how a model is computed where that is not the default.

    Args:
        model: of `mllama_jax`.
    """
    import jax

    from mllama_jax.sharding import describe

    dtype = jax.numpy.dtype(model.dtype).name
    choices = (model.mesh, dtype, model.attention, model.quantise)
    if choices == (None, "float32", "xla", None) or jax.process_index():
        return
    device = jax.devices()[0].device_kind if model.mesh is None else describe(model.mesh)
    weights = f"; decoder weights {model.quantise}" if model.quantise else ""
    print(f"{device}; {dtype}; attention {model.attention}{weights}", file=sys.stderr)
