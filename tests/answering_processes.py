"""Runs the engine on a mesh: `answering_processes.py MESH …`, read by `test_batch_mesh.py`."""

import json
import sys
from dataclasses import replace
from typing import Any

import jax
from asking import EXAMPLE, GREEDY, OPTIONS, PROCESSOR, answers, mixed, tokens

import mllama_jax as mj
from mllama_jax.batch import sizes
from mllama_jax.batch.engine import Engine
from mllama_jax.batch.pictures import PictureSources


def main(meshes: list[str]) -> dict[str, Any]:
    """For each mesh the tokens of each answer, the bytes of the slots on one device, and how many
    programs were compiled after the warm-up."""
    drawn = replace(GREEDY, temperature=1.0, top_p=0.9)
    requests = [*mixed(10, seed=3), *mixed(6, seed=4, temperature=drawn.temperature, top_p=0.9)]
    found = {}
    compiled: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for mesh in meshes:
        model, params = mj.MllamaForConditionalGeneration.from_pretrained(
            EXAMPLE / "model", mesh=mesh or None
        )
        options = replace(OPTIONS, num_slots=4)
        sources = PictureSources((EXAMPLE / "demo" / "pictures",))
        engine = Engine(model, params, PROCESSOR, options=options, sources=sources)
        device = jax.devices()[0]
        slots = jax.tree.leaves(engine._device._slots)
        held = sum(s.data.nbytes for x in slots for s in x.addressable_shards if s.device == device)
        engine.warm_up()
        compiled.clear()
        texts = {name: tokens(answer) for name, answer in answers(engine, requests).items()}
        found[mesh] = {
            "tokens": texts,
            "held": held,
            "predicted": sizes._slots_memory(model, options),
            "compiled": len(compiled),
        }
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
