"""Quantised weights on eight devices; `test_weight_quantisation.py` runs this as a script."""

import json
import sys
from typing import Any

import flax.traverse_util
import jax
import numpy as np

import mllama_jax as mj
from mllama_jax.sharding import param_shardings, parse_mesh

MODEL = mj.MllamaForCausalLM


def main(folder: str, meshes: str, kinds: str) -> dict[str, Any]:
    """What of parameters and logits on a mesh differs from those on one device."""
    assert jax.device_count() == 8
    ids = np.random.default_rng(0).integers(3, 60, (8, 12))

    def logits(model: Any, params: Any) -> np.ndarray:
        run = jax.jit(lambda p: model.apply({"params": p}, input_ids=ids, use_cache=False).logits)
        return np.asarray(run(params))

    found = {}
    for kind in json.loads(kinds):
        model, params = MODEL.from_pretrained(folder, quantise=kind)
        one, expected = _leaves(params), logits(model, params)
        for mesh in json.loads(meshes):
            model, params = MODEL.from_pretrained(folder, quantise=kind, mesh=mesh)
            leaves = _leaves(params)
            assert leaves.keys() == one.keys()
            places = _leaves(param_shardings(model, parse_mesh(mesh)))
            split = logits(model, params)
            found[f"{kind} {mesh}"] = {
                "different": [name for name in one if not _same(leaves[name], one[name])],
                "misplaced": [n for n in one if leaves[n].sharding != places[n]],
                "whole": [n for n, x in leaves.items() if x.sharding.is_fully_replicated],
                "error": float(np.abs(split - expected).max() / np.abs(expected).max()),
            }
    return found


def _leaves(tree: Any) -> dict[str, Any]:
    return {"/".join(path): leaf for path, leaf in flax.traverse_util.flatten_dict(tree).items()}


def _same(one: Any, other: Any) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
