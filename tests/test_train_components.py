"""What is trained, and with which rates: components, presets, optimizers."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_model import CONFIG

import mllama_jax as mj
from mllama_jax.train.components import (
    component_of,
    describe_trained,
    is_gate,
    rounding_warning,
    split,
)
from mllama_jax.train.config import ConfigError
from mllama_jax.train.config_file import load_config
from mllama_jax.train.lora import adapters_of
from mllama_jax.train.optimizers import learning_rates, make_optimizer
from mllama_jax.train.settings import (
    COMPONENTS,
    PRESETS,
    ComponentConfig,
    LoraConfig,
    OptimizerConfig,
    Recipe,
    TrainedConfig,
)
from mllama_jax.train.step import init_state, placed_like, start

LAYER = "language_model/model/layers/block_1"
SOME = (
    *(f"{LAYER}/cross_attn/o_proj/kernel", f"{LAYER}/cross_attn/k_proj/kernel"),
    f"{LAYER}/cross_attn_attn_gate",
    *(f"{LAYER}/input_layernorm/scale", "language_model/lm_head/kernel"),
    *("multi_modal_projector/kernel", "multi_modal_projector/bias"),
    *("vision_model/class_embedding", "vision_model/patch_embedding/kernel"),
)
MODEL = mj.MllamaForConditionalGeneration(CONFIG)
SHAPES = MODEL.param_shapes()
EXPECTED = {
    "vision_local": (
        *("class_embedding", "patch_embedding/kernel", "layernorm_pre/bias"),
        *("gated_positional_embedding/embedding", "pre_tile_positional_embedding/embedding"),
        *("gated_positional_embedding/tile_embedding", "/transformer/layers/mlp/fc1/kernel"),
    ),
    "vision_global": (
        *("layernorm_post/scale", "post_tile_positional_embedding/embedding"),
        "global_transformer/layers/self_attn/q_proj/kernel",
    ),
    "vision_gates": (
        *("gate_attn", "gate_ffn", "gated_positional_embedding/gate"),
        *("pre_tile_positional_embedding/gate", "post_tile_positional_embedding/gate"),
    ),
    "projector": ("multi_modal_projector/kernel", "multi_modal_projector/bias"),
    "self_attention": ("block_0/mlp/gate_proj/kernel", "block_2/self_attn/q_proj/kernel"),
    "cross_attention": (
        *("block_1/cross_attn/q_norm/scale", "block_1/mlp/gate_proj/kernel"),
        "block_1/input_layernorm/scale",
    ),
    "gates": ("block_1/cross_attn_attn_gate", "block_1/cross_attn_mlp_gate"),
    "embeddings": ("embed_tokens/embedding",),
    "head": ("lm_head/kernel", "model/norm/scale"),
}


def members(tree: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in flatten_dict(tree):
        found.setdefault(component_of(MODEL, path), set()).add("/".join(path))
    return found


def test_every_parameter_is_of_one_component():
    found = members(SHAPES)
    assert tuple(EXPECTED) == COMPONENTS
    assert found.keys() == EXPECTED.keys()
    for name, ends in EXPECTED.items():
        for end in ends:
            assert any(path.endswith(end) for path in found[name]), (name, end)
    for name in ("vision_gates", "gates", "embeddings", "projector", "head"):
        assert all(path.endswith(EXPECTED[name]) for path in found[name]), name


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset: str):
    trained, frozen = split(MODEL, SHAPES, TrainedConfig(preset))
    expected = {name for name, mode in PRESETS[preset].items() if mode == "full"}
    assert set(members(trained)) == expected
    assert set(members(frozen)) == set(COMPONENTS) - expected
    paths = adapters_of(MODEL, Recipe(9, trained=TrainedConfig(preset)))
    by_lora = {component_of(MODEL, (*path, "kernel")) for path in paths}
    assert by_lora == {name for name, mode in PRESETS[preset].items() if mode == "lora"}


def test_the_default_is_metas_recipe():
    modes = TrainedConfig().modes
    assert {name for name, mode in modes.items() if mode == "frozen"} == {
        *("self_attention", "embeddings", "head")
    }
    assert set(modes.values()) == {"full", "frozen"}


def test_components_may_differ_from_the_preset():
    config = TrainedConfig("lora", gates=ComponentConfig("full"), head=ComponentConfig("lora"))
    recipe = Recipe(9, trained=config, lora=LoraConfig(rank=3, targets=("*/q_proj", "*lm_head")))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), SHAPES)
    state, frozen = start(MODEL, params, recipe, 0)
    paths = flatten_dict(state.params, sep="/")
    assert {path.rpartition("/")[2] for path in paths} == {
        *("a", "b", "cross_attn_attn_gate", "cross_attn_mlp_gate")
    }
    assert {leaf.dtype for leaf in paths.values()} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    table = [line.split() for line in describe_trained(MODEL, state.params, frozen).splitlines()]
    assert table[0] == ["parameters", "frozen", "lora", "full"]
    counts = {row[0]: row[1:] for row in table[1:]}
    assert counts["gates"] == ["-", "-", "4"]
    assert counts["head"][1] == f"{3 * (24 + 61)}"
    assert counts["cross_attention"][1] == f"{2 * 3 * (24 + 24)}"
    whole = sum(leaf.size for leaf in jax.tree.leaves(SHAPES))
    assert counts["all"][0] == f"{whole - 4:,}"


@pytest.mark.parametrize(
    ("config", "lora", "message"),
    [
        (TrainedConfig("frozen"), LoraConfig(), "nothing is trained"),
        (TrainedConfig(gates=ComponentConfig("lora")), LoraConfig(), "gates can't have mode lora"),
        (TrainedConfig("lora"), LoraConfig(targets=("*/fc1",)), "'.*fc1' matches no projection"),
    ],
)
def test_what_matches_nothing_is_refused(config: TrainedConfig, lora: LoraConfig, message: str):
    recipe = Recipe(9, trained=config, lora=lora)

    def prepare() -> str:
        adapters_of(MODEL, recipe)
        return describe_trained(MODEL, *split(MODEL, SHAPES, config))

    with pytest.raises(ValueError, match=message):
        prepare()


def first_step(config: OptimizerConfig, trained: TrainedConfig) -> tuple[dict[str, Any], Any]:
    """What random gradients change in a parameter of every kind, all ones, and the new state."""
    leaves = flatten_dict(SHAPES, sep="/")
    params = {path: np.ones(leaves[path].shape, np.float32) for path in SOME}
    random = np.random.default_rng(0)
    grads = {path: random.normal(size=x.shape).astype(np.float32) for path, x in params.items()}
    params, grads = (unflatten_dict(tree, sep="/") for tree in (params, grads))
    optimizer = make_optimizer(MODEL, Recipe(9, config, trained))

    @jax.jit
    def run(params: Any, grads: Any) -> Any:
        return optimizer.update(grads, optimizer.init(params), params)

    updates, state = run(params, grads)
    return flatten_dict(jax.device_get(updates), sep="/"), state


def test_rates_and_decays_of_components():
    """Adam's first step is as large as its rate, and the decay comes on top."""
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.5, eps=1e-15, schedule="constant")
    trained = TrainedConfig(
        "all",
        projector=ComponentConfig(learning_rate=1e-2, weight_decay=0.25),
        gates=ComponentConfig(learning_rate=2e-3),
        head=ComponentConfig(weight_decay=0.0),
    )
    changes, _ = first_step(config, trained)
    for path, change in changes.items():
        component = component_of(MODEL, tuple(path.split("/")))
        rate = {"projector": 1e-2, "gates": 2e-3}.get(component, 1e-3)
        decay = {"projector": 0.25, "head": 0.0}.get(component, 0.5)
        decay = decay if path.endswith("kernel") else 0.0
        np.testing.assert_allclose(np.abs(change + rate * decay), rate, rtol=1e-4, err_msg=path)


def test_moments_may_be_bfloat16():
    _, state = first_step(OptimizerConfig(moment_dtype="bfloat16"), TrainedConfig("all"))
    assert {x.dtype for x in jax.tree.leaves(state[1][0].mu)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state[1][0].nu)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_moments_of_bfloat16_parameters_are_float32(name: str):
    recipe = Recipe(9, OptimizerConfig(name), TrainedConfig("all"))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), SHAPES)
    state = jax.eval_shape(make_optimizer(MODEL, recipe).init, params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}


def test_a_run_warns_of_steps_that_are_rounded_away():
    coarse = {"kernel": jnp.ones((3, 5), jnp.bfloat16), "gate": jnp.ones(1)}
    said = rounding_warning(coarse, 1e-5) or ""
    assert "15 trained parameters are bfloat16" in said
    assert "where a parameter is above 0.003" in said
    # That is so: half of the distance between neighbours is where a step begins to count.
    value = jnp.array(0.0039, jnp.bfloat16)
    assert value + jnp.array(1e-5, jnp.bfloat16) == value
    assert jnp.array(0.0019, jnp.bfloat16) + jnp.array(1e-5, jnp.bfloat16) > 0.0019
    assert rounding_warning({"gate": jnp.ones(1)}, 1e-5) is None


def test_muon_makes_orthogonal_updates_of_every_layers_projections():
    rate = 1e-3
    config = OptimizerConfig("muon", rate, "constant", weight_decay=0.0, max_grad_norm=np.inf)
    changes, _ = first_step(config, TrainedConfig("all"))
    # (layers, heads, head, hidden) and (layers, hidden, heads, head)
    for name, shape in (("o_proj", (24, 24)), ("k_proj", (24, 12))):
        layers = changes.pop(f"{LAYER}/cross_attn/{name}/kernel")
        assert len(layers) == 2
        for layer in layers:
            values = np.linalg.svd(layer.reshape(shape), compute_uv=False)
            # Five steps of Newton and Schulz bring all but the smallest near one.
            found = values[: len(values) - 2] / (0.2 * np.sqrt(24) * rate)
            np.testing.assert_allclose(found, 1, atol=0.35)
    for path, change in changes.items():
        np.testing.assert_allclose(np.abs(change), rate, rtol=1e-4, err_msg=path)


def test_adafactor_keeps_sums_instead_of_moments():
    params = {"language_model": {"lm_head": {"kernel": jnp.ones((256, 384))}}}
    config = OptimizerConfig("adafactor", learning_rate=1e-2, weight_decay=0.0)
    optimizer = make_optimizer(MODEL, Recipe(9, config, TrainedConfig("all")))
    state = init_state(params, optimizer, 0)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 256 + 384 + 10
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 0.3), params)
    updates, _ = optimizer.update(grads, state.opt_state, params)
    np.testing.assert_allclose(jax.tree.leaves(updates)[0], -1e-2, rtol=1e-3)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("fsdp",))
    split_up = jax.NamedSharding(mesh, jax.P("fsdp", None))
    placed = placed_like(jax.eval_shape(lambda: state.opt_state), jax.device_put(params, split_up))
    assert all(leaf.sharding.spec == jax.P() for leaf in jax.tree.leaves(placed))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
        ("linear", [0, 1, 2, 1.8, 1.6, 1.4, 1.2, 1.0, 0.8, 0.6, 0.4]),
        ("wsd", [0, 1, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4]),
    ],
)
def test_schedules(schedule: str, expected: list[float]):
    config = OptimizerConfig(
        *("adamw", 2.0, schedule), warmup_steps=2, decay_fraction=0.4, final_fraction=0.2
    )
    rates = learning_rates(config, 10)
    np.testing.assert_allclose([rates(step) for step in range(11)], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trained.presets=all", "did you mean 'trained.preset'?"),
        ("trained.projektor.mode=full", "did you mean 'trained.projector'?"),
        ("trained.projector.lr=1", "unknown key 'trained.projector.lr'"),
        ("trained.projector=full", "expected a section with any of mode, learning_rate, weight_d"),
        ("trained.preset=most", "expected adapters or cross_attention or all"),
        ("trained.gates.mode=half", "trained.gates.mode='half': expected frozen or lora or full"),
        ("trained.head.learning_rate=0", "trained.head.learning_rate=0.0: expected a number above"),
        ("trained.head.weight_decay=many", "is 'many'; expected a number or null"),
        ("lora.rank=0", "lora.rank=0: expected a number above 0"),
        ("optimizer.name=sgd", "optimizer.name='sgd': expected adamw or adafactor or muon"),
        ("optimizer.schedule=step", "expected cosine or wsd or linear or constant"),
        ("optimizer.microbatches=3", "expected a divisor of data.batch_size=8"),
        ("optimizer.z_loss=-1", "optimizer.z_loss=-1.0: expected 0 or more"),
        ("optimizer.moment_dtype=int8", "optimizer.moment_dtype='int8': expected float32 or"),
        ("model.quantise=int3", "model.quantise='int3': expected one of int8, int4, nf4, or null"),
    ],
)
def test_mistakes_are_explained(tmp_path: Any, word: str, expected: str):
    file = tmp_path / "train.yaml"
    file.write_text("output: o\nsteps: 10\nmodel: {path: m}\ndata: {train: t.jsonl}\n")
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_config(file, [word])


def test_a_recipe_is_read_from_a_file(tmp_path: Any):
    file = tmp_path / "train.yaml"
    file.write_text(
        "output: o\nsteps: 10\nmodel: {path: m}\ndata: {train: t.jsonl}\n"
        "trained: {preset: cross_attention, projector: {mode: full, learning_rate: 1e-5}}\n"
    )
    recipe = load_config(file, ["trained.gates.mode=frozen"]).recipe
    assert recipe == Recipe(
        10,
        trained=TrainedConfig(
            "cross_attention",
            projector=ComponentConfig("full", 1e-5),
            gates=ComponentConfig("frozen"),
        ),
    )
    assert hash(recipe) is not None
    assert not any(is_gate(path) for path in flatten_dict(split(MODEL, SHAPES, recipe.trained)[0]))
