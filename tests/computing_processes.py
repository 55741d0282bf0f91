"""What `test_mesh_generation.py` runs in processes of its own: models on meshes of 8 devices.

The number of devices is fixed when jax starts. ``computing_processes.py TASK ARGUMENT …`` prints
what it found as its last line, as JSON.
"""

import contextlib
import functools
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.experimental import multihost_utils
from tiny_model import make_inputs

import mllama_jax as mj
from mllama_jax import cli, sharding
from mllama_jax.generation import generate as generation

ROWS = {
    # For each sample its images, (place, aspect-ratio id), and its tokens.
    8: (
        [[(1, 2)], [], [(0, 3), (4, 1)], [(2, 1)], [], [(3, 3)], [(1, 1), (2, 2)], []],
        range(5, 13),
    ),
    2: ([[(1, 2)], [(0, 3), (4, 1), (5, 2)]], (6, 9)),
}
NEW_TOKENS = 6
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 30, "top_p": 0.9, "seed": 3}


def compute(folder: str, cases: str) -> list[dict[str, Any]]:
    """Runs models on meshes and on one device, and compares.

    Args:
        folder: holds the checkpoints.
        cases: JSON, (checkpoint, mesh, rows of `generate`'s batch) of each case.
    """
    on_one = functools.cache(lambda name, rows: _computed(_load(folder, name), rows))
    found = []
    for name, mesh, rows in json.loads(cases):
        model, params = _load(folder, name, mesh=mesh)
        here = _computed((model, params), rows)
        misplaced = _misplaced(here["grads"], params)
        here |= {key: jax.tree.map(_whole, here[key]) for key in ("loss", "logits", "grads")}
        expected = on_one(name, rows) if jax.process_index() == 0 else here  # once is enough
        found.append(
            {
                "mesh": dict(model.mesh.shape),
                "errors": dict(_errors(here, expected)),
                "greedy": [here["greedy"], expected["greedy"]],
                "sampled": [here["sampled"], expected["sampled"]],
                "misplaced gradients": misplaced,
                "cache": here["cache"],
            }
        )
    return found


def _load(folder: str, name: str, **settings: Any) -> tuple[Any, Any]:
    return mj.MllamaForConditionalGeneration.from_pretrained(Path(folder, name), **settings)


def _computed(loaded: tuple[Any, Any], rows: int) -> dict[str, Any]:
    """Loss, logits, gradients and answers of a batch, and how the cache is split."""
    model, params = loaded
    inputs = make_inputs(*ROWS[8])
    inputs["labels"] = np.where(inputs["attention_mask"] == 1, inputs["input_ids"] % 61, -100)

    @jax.jit
    def loss_and_logits(params: Any, inputs: Any) -> tuple[Any, Any]:
        output = model.apply({"params": params}, **inputs)
        return output.loss, output.logits

    placed = {name: sharding.place(values, model.mesh) for name, values in inputs.items()}
    differentiate = jax.jit(jax.value_and_grad(loss_and_logits, has_aux=True))
    (loss, logits), grads = differentiate(params, placed)
    prompts = make_inputs(*ROWS[rows], side="left")
    caches: list[Any] = []
    generate = functools.partial(
        model.generate, params, **prompts, max_new_tokens=NEW_TOKENS, eos_token_id=None
    )
    with _noted_caches(caches):
        greedy, sampled = generate(), generate(**SAMPLED)
    return {
        "loss": loss,
        "logits": logits,
        "grads": grads,
        "greedy": greedy.new_tokens.tolist(),
        "sampled": sampled.new_tokens.tolist(),
        "cache": caches[0],
    }


@contextlib.contextmanager
def _noted_caches(noted: list[Any]) -> Iterator[None]:
    """Notes meanwhile how large the cache is that goes into `decode`, and one device's part."""
    decode = generation.decode

    def decode_and_note(model: Any, params: Any, state: Any, *rest: Any) -> Any:
        keys = state.cache.keys
        noted.append([keys.nbytes, keys.addressable_shards[0].data.nbytes])
        return decode(model, params, state, *rest)

    generation.decode = decode_and_note
    yield
    generation.decode = decode


def _errors(here: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The largest difference, relative to the largest value, in the worst of the gradients."""
    for name in ("loss", "logits", "grads"):
        flat = zip(jax.tree.leaves(here[name]), jax.tree.leaves(expected[name]), strict=True)
        yield name, float(np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in flat]))


def _whole(x: Any) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _misplaced(grads: Any, params: Any) -> list[str]:
    """Names of the gradients that are not split as their parameters are."""
    grads, params = map(flax.traverse_util.flatten_dict, (grads, params))
    return [
        "/".join(path)
        for path, grad in grads.items()
        if not grad.sharding.is_equivalent_to(params[path].sharding, grad.ndim)
    ]


def one_of_two(folder: str, cases: str, command: str) -> dict[str, Any]:
    """The same where this process has half of the devices, and the command line.

    Args:
        folder, cases: as in `compute`.
        command: JSON, the words of a command that joins the processes.
    """
    sys.argv = ["mllama-jax", *json.loads(command)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        cli.main()
    assert jax.process_count() == 2
    assert len(jax.local_devices()) == 4
    model, params = _load(folder, "scanned", mesh="data=2,fsdp=4")
    prompts = make_inputs(*ROWS[2])
    try:
        model.generate(params, **prompts, max_new_tokens=2 + jax.process_index())
    except ValueError as error:
        refusal = str(error)
    found = {"printed": printed.getvalue(), "refusal": refusal}
    return found | {"cases": compute(folder, cases)}


if __name__ == "__main__":
    task = {"compute": compute, "one_of_two": one_of_two}[sys.argv[1]]
    print(json.dumps(task(*sys.argv[2:])), file=sys.__stdout__)
