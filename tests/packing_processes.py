"""What `test_packing.py` runs on eight devices in a process of its own: see `processes.py`."""

import json
import sys
from typing import Any

import jax
import numpy as np
from packed_texts import packed
from tiny_model import CONFIG, random_params

import mllama_jax as mj
from mllama_jax.sharding import param_shardings, parse_mesh, place

if __name__ == "__main__":
    mesh = parse_mesh("data=2,fsdp=2,tensor=2")
    model = mj.MllamaForConditionalGeneration(CONFIG, mesh=mesh)
    params = jax.device_put(random_params(model), param_shardings(model, mesh))
    twice = {name: np.concatenate([x, x[::-1]]) for name, x in packed().items()}
    batch = {name: place(x, mesh, "batch", *[None] * (x.ndim - 1)) for name, x in twice.items()}

    @jax.jit
    def learn(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            return model.apply({"params": params}, **batch, method="loss")

        return jax.value_and_grad(loss, has_aux=True)(params)

    (total, count), gradients = learn(params, batch)
    np.savez(sys.argv[1], *map(np.asarray, jax.tree.leaves(gradients)))
    print(json.dumps([float(total), int(count)]))
