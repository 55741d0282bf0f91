"""The recipes of recipes/ are what the planner was asked about, and fit."""

import json
from pathlib import Path

import pytest

from mllama_jax.model import MllamaForConditionalGeneration
from mllama_jax.plan.job import resolved
from mllama_jax.plan.models import find_config
from mllama_jax.plan.recipes import job_of
from mllama_jax.plan.topology import parse_topology
from mllama_jax.train.config_file import from_yaml, load_config
from mllama_jax.train.lora import adapters_of

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
PLANS = {
    plan["recipe"]: plan
    for plan in map(json.loads, (FOLDER / "plans.json").read_text().splitlines())
}


def test_every_plan_has_its_recipe():
    assert {file.stem for file in RECIPES} == set(PLANS)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_fits_as_it_was_planned(file):
    config, plan = load_config(file), PLANS[file.stem]
    assert from_yaml(plan["config"]) == config
    assert plan["fits"]
    assert plan["needed_gib"] < plan["usable_gib"]
    topology = parse_topology(plan["topology"])
    assert topology.name in file.read_text()
    size, how, _ = file.stem.split("_")
    assert f"-{size.upper()}-" in config.model.path
    released = find_config(config.model.path)
    if topology.chip.is_gpu:  # whose compiler estimates no cycles, and is not here
        assert plan["mfu_at_most"] is None
    else:
        assert 0.02 < plan["mfu_at_most"] < 0.9
        resolved(job_of(config, plan["topology"], 1), released, topology)  # mesh and batch divide
    model = MllamaForConditionalGeneration(released)
    assert bool(adapters_of(model, config.recipe)) == how.endswith("lora")
    assert (config.model.quantise is not None) == (how == "qlora")
