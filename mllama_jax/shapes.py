"""The one-letter axes that names, einsums and annotations in this package use.

A suffix such as ``x_BTD`` lists the axes of an array; jaxtyping annotations use the same letters.

==  ==================================================================================
B   batch (samples)
T   text tokens of this call (queries)
S   key and value slots (cache length, or T without a cache)
M   images of a sample
L   tile slots of an image (``max_num_tiles``)
P   patches of a tile, class token included (``MllamaVisionConfig.num_patches``)
V   image tokens of a sample, ``M * L * P``
E   tokens of one image inside the vision encoder, padding included
C   colour channels
D   hidden size
N   query heads
K   key/value heads
G   query heads that share a key/value head, ``N // K``
H   head dimension
F   hidden size of the feed-forward block
W   vocabulary (logits)
R   aspect-ratio ids, 0 ("no image") included
U   repeating units of the decoder
==  ==================================================================================
"""

from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, UInt

if TYPE_CHECKING:
    from jax import Array as Array
else:
    # Callers may pass NumPy's arrays; what comes out is JAX's.
    Array = jax.Array | np.ndarray

__all__ = ["Array", "Bool", "Float", "Int", "UInt"]
