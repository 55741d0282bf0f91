"""Shapes and dtypes that annotations promise are checked at run time, in tests only."""

from jaxtyping import install_import_hook

CHECKED = ("attention", "decoder", "decoding", "layers", "loss", "masks", "rope", "sampling")

install_import_hook([f"mllama_jax.{module}" for module in CHECKED], "beartype.beartype")
