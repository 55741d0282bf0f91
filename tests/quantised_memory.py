"""What loading int8 weights takes, from the start; `test_weight_quantisation.py` runs this."""

import json
import sys
from pathlib import Path

import jax
from processes import memory

from mllama_jax import MllamaTextConfig
from mllama_jax.convert import load_params


def main(folder: str) -> dict[str, int]:
    """Bytes of the parameters, and by how much the process grew at most."""
    config = MllamaTextConfig.from_pretrained(folder)
    jax.devices()  # the runtime's own memory is not the loading's
    Path("/proc/self/clear_refs").write_text("5")  # the peak is taken from here on
    before = memory("VmRSS")
    params = load_params(folder, config, "text_model", quantise="int8")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {"held": held, "grown": memory("VmHWM") - before}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
