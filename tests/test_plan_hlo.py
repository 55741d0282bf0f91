"""What is read from compiled programs is what was put into them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_model import CONFIG, TILE

from mllama_jax import MllamaConfig, MllamaForConditionalGeneration
from mllama_jax.loops import at_most
from mllama_jax.plan.collectives import Collective, find_collective, network_seconds
from mllama_jax.plan.compiling import compile_program
from mllama_jax.plan.hlo import ProgramCost, Unestimated, out_of_memory, program_cost
from mllama_jax.plan.hlo_text import parse_module, trip_count
from mllama_jax.plan.parts import part_of, phase_of
from mllama_jax.plan.topology import parse_topology
from mllama_jax.train.compiler_options import compiler_options
from mllama_jax.train.settings import Recipe, TrainedConfig
from mllama_jax.train.step import start, train_step

P = PartitionSpec
SIZE = 1024


@pytest.fixture(scope="module")
def chip() -> Mesh:
    return parse_topology("v5e:1x1").mesh("data=1")


@pytest.fixture(scope="module")
def square() -> Mesh:
    return parse_topology("v5e:2x2").mesh("fsdp=2,tensor=2")


def cost_of(function: Callable[..., Any], *arguments: Any) -> ProgramCost:
    return program_cost(compile_program(jax.jit(function).lower(*arguments)).schedule)


def array(mesh: Mesh, shape: tuple[int, ...], *spec: Any, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def products(cost: ProgramCost) -> float:
    return sum(item.cycles for item in cost.cycles if item.kind == "products")


def nested(outer: int, inner: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """So many times so many products."""

    def function(x: jax.Array, w: jax.Array) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ w), None

        def steps(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.scan(step, x + 1, length=inner)[0], None

        return jax.lax.scan(steps, x, length=outer)[0]

    return function


def test_programs_that_are_no_text_afterwards() -> None:
    """The lookup is another core's, started with several operands: asked for text, jax fails."""
    mesh = parse_topology("v6e:1x1").mesh("data=1")
    given = (array(mesh, (128264, 256)), array(mesh, (32768,), dtype=jnp.int32))
    lowered = jax.jit(lambda table, ids: jnp.tanh(table.at[ids].get(mode="clip"))).lower(*given)
    with pytest.raises(jax.errors.JaxRuntimeError):
        lowered.compile().as_text()
    assert program_cost(compile_program(lowered).schedule).total_cycles > 0


def test_loops_count_as_often_as_they_run(chip: Mesh) -> None:
    x = array(chip, (SIZE, SIZE))
    once = products(cost_of(lambda x, w: jnp.tanh(x @ w), x, x))
    cost = cost_of(nested(7, 5), x, x)
    # Weights that stay in fast memory are not read again: a product in a loop takes less.
    assert 0.5 < products(cost) / 35 / once < 1
    assert products(cost_of(nested(21, 5), x, x)) == 3 * products(cost)
    assert products(cost_of(nested(7, 10), x, x)) == 2 * products(cost)
    assert not any(item.in_open_loop for item in cost.cycles)


def test_loop_whose_length_the_values_decide(chip: Mesh) -> None:
    def decode(x: jax.Array, w: jax.Array) -> jax.Array:
        def layers(x: jax.Array) -> jax.Array:
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=4)[0]

        x = jax.lax.while_loop(lambda x: jnp.sum(x, dtype=jnp.float32) < 9, layers, x)
        return x @ w @ w

    x = array(chip, (SIZE, SIZE))
    cost = cost_of(decode, x, x)
    assert products(cost) / products(cost.in_open_loop()) == pytest.approx(6 / 4, rel=0.15)


def test_loop_with_a_bound(chip: Mesh) -> None:
    """It counts as often as it may run, and the loops in it as often as they do."""

    def step(most: int) -> Any:
        def times(x: jax.Array, w: jax.Array) -> jax.Array:
            runs = jnp.minimum(jnp.argmax(x[0]), most)
            with at_most(most):
                return jax.lax.fori_loop(0, runs, lambda _, x: nested(3, 2)(x, w), x)

        return times

    x = array(chip, (SIZE, SIZE))
    three = cost_of(step(3), x, x)
    assert not three.has_open_loops
    assert products(cost_of(step(9), x, x)) == 3 * products(three)
    assert products(three) == pytest.approx(products(cost_of(nested(18, 1), x, x)), rel=0.1)


@pytest.mark.parametrize(
    ("name", "at_least"), [("v5e:1x1", 0.95), ("v6e:1x1", 0.85), ("v5p:2x2x1", 0.95)]
)
def test_cycles_of_a_large_product_are_near_the_peak(name: str, at_least: float) -> None:
    topology = parse_topology(name)
    mesh = topology.mesh(f"data={topology.num_devices}")
    rows, inner, columns = 4096, 4096, 14336
    x = array(mesh, (rows * topology.num_devices, inner), "data")
    cost = cost_of(lambda x, w: x @ w, x, array(mesh, (inner, columns)))
    seconds = cost.total_cycles / topology.chip.clock
    share = 2 * rows * inner * columns / seconds / topology.chip.peak_flops
    assert at_least < share <= 1


def exchange(name: str) -> Callable[[jax.Array], jax.Array]:
    return {
        "all-gather": lambda x: jax.lax.all_gather(x, "fsdp", tiled=True),
        "all-reduce": lambda x: jax.lax.psum(x, "fsdp"),
        "reduce-scatter": lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
        "all-to-all": lambda x: jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True),
        "collective-permute": lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]),
    }[name]


@pytest.mark.parametrize(
    ("operation", "whole", "sent"),
    [
        ("all-gather", 2, 1),
        ("all-reduce", 1, 1),
        ("reduce-scatter", 1, 0.5),
        ("all-to-all", 1, 0.5),
        ("collective-permute", 1, 1),
    ],
)
def test_exchanges(square: Mesh, operation: str, whole: float, sent: float) -> None:
    function = exchange(operation)

    def shared(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x + 1, function(x)), x, length=3)[1]

    mapped = jax.shard_map(
        shared, mesh=square, in_specs=P("tensor"), out_specs=P(None, "tensor"), check_vma=False
    )
    cost = cost_of(mapped, array(square, (2 * SIZE, SIZE), "tensor", dtype=jnp.float32))
    (found,) = (item for item in cost.collectives if item.bytes > 1e4)
    part = 4 * SIZE * SIZE
    assert found.operation == operation
    assert found.bytes == whole * part
    assert found.bytes_sent == sent * part
    assert found.runs == 3
    assert found.group_size == 2
    assert found.axes(square) == ("fsdp",)


def test_weights_are_gathered_once_in_each_pass() -> None:
    mesh = parse_topology("v5e:2x2").mesh("fsdp=4")
    layers, width = 5, 2048

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return jnp.mean(x, dtype=jnp.float32)

    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        sharding = NamedSharding(mesh, P(None, "fsdp"))
        return jax.lax.with_sharding_constraint(jax.grad(loss)(w, x), sharding)

    w = array(mesh, (layers, width, width), None, "fsdp")
    cost = cost_of(step, w, array(mesh, (4 * width, width), "fsdp"))
    moved = dict.fromkeys(("forward", "backward"), 0.0)
    for item in cost.collectives:
        moved[item.phase] += item.bytes_sent * item.runs
        assert item.axes(mesh) == ("fsdp",)
    once = layers * 2 * width * width * 3 / 4
    assert moved["forward"] == once
    # Weights once more, and sums of gradients. Done piece by piece, sums send some pieces twice.
    assert 2 <= moved["backward"] / once < 3


def test_exchanges_by_sparse_cores() -> None:
    """They are read behind one more call, and go on beside the products."""
    mesh = parse_topology("v6e:2x4").mesh("fsdp=8")

    def forward(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ whole(w)), None), x, w)[0]

    def whole(w: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))

    w = array(mesh, (3, 2048, 2048), None, "fsdp")
    step = jax.jit(forward, compiler_options=dict(compiler_options("TPU v6 lite")))
    lowered = step.lower(w, array(mesh, (8 * 2048, 2048), "fsdp"))
    (found,) = program_cost(compile_program(lowered).schedule).collectives
    assert (found.operation, found.runs, found.overlaps) == ("all-gather", 3, True)
    assert found.bytes == 2 * 2048**2


BETWEEN_SLICES = {
    "all-reduce": (lambda x: x.reshape(2, SIZE, SIZE).sum(0), P(None, "fsdp"), 1),
    "all-gather": (lambda x: x + 1, P(None, "fsdp"), 2),
    "reduce-scatter": (lambda x: x.reshape(2, SIZE, SIZE).sum(0), P("data", "fsdp"), 1),
    "all-to-all": (lambda x: x.reshape(2, SIZE, SIZE) + 1, P(None, "data", "fsdp"), 1),
}


@pytest.mark.parametrize("operation", BETWEEN_SLICES)
def test_exchanges_between_slices(operation: str) -> None:
    function, spec, whole = BETWEEN_SLICES[operation]
    topology = parse_topology("v5e:2x2*2")
    mesh = topology.mesh("data=2,fsdp=4")
    x = array(mesh, (2 * SIZE, SIZE), "data", "fsdp", dtype=jnp.float32)
    placed = NamedSharding(mesh, spec)
    cost = cost_of(lambda x: jax.lax.with_sharding_constraint(function(x), placed), x)
    (found,) = (item for item in cost.collectives if item.bytes > 1e4)
    assert (found.operation, found.slices, found.axes(mesh)) == (operation, 2, ("data",))
    assert found.bytes == whole * 4 * SIZE * SIZE / 4
    seconds = found.bytes_sent / topology.chip.dcn_bandwidth
    assert network_seconds(found, topology, mesh) == seconds


def test_out_of_memory(chip: Mesh) -> None:
    x = array(chip, (5 * 2**18, 1024), dtype=jnp.float32)  # 5 GiB
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: (x + 1, x + 2, x + 3)).lower(x).compile()
    assert out_of_memory(caught.value) == (20 * 2**30, int(15.75 * 2**30))
    assert out_of_memory(ValueError("RESOURCE_EXHAUSTED: some quota")) is None


def test_parts_of_a_training_step(chip: Mesh) -> None:
    values = CONFIG.to_dict()
    values["text_config"] |= {"num_hidden_layers": 2, "cross_attention_layers": [1]}
    values["vision_config"] |= {"num_hidden_layers": 1, "num_global_layers": 1}
    values["vision_config"] |= {"intermediate_layers_indices": [0], "vision_output_dim": 40}
    model = MllamaForConditionalGeneration(MllamaConfig.from_dict(values), mesh=chip)
    recipe = Recipe(9, trained=TrainedConfig("all"))
    on_one = model.clone(mesh=None)
    state, _ = jax.eval_shape(lambda params: start(on_one, params, recipe, 0), model.param_shapes())
    state = jax.tree.map(lambda leaf: array(chip, leaf.shape, dtype=leaf.dtype), state)
    shapes: dict[str, tuple[int, ...]] = {
        **dict.fromkeys(("input_ids", "attention_mask", "labels"), (2, 16)),
        "aspect_ratio_ids": (2, 1),
        "aspect_ratio_mask": (2, 1, 3),
        "cross_attention_mask": (2, 16, 1, 3),
    }
    batch = {name: array(chip, shape, dtype=jnp.int32) for name, shape in shapes.items()}
    batch["pixel_values"] = array(chip, (2, 1, 3, *TILE), dtype=jnp.float32)
    lowered = train_step.lower(state, batch, {}, model=model, recipe=recipe)
    cost = program_cost(compile_program(lowered).schedule)
    parts = cost.by_part()
    with_products = {(item.part, item.phase) for item in cost.cycles if item.kind == "products"}
    for part in (
        *("vision encoder", "projector", "decoder MLPs"),
        *("decoder self-attention", "decoder cross-attention"),
    ):
        assert {(part, "forward"), (part, "backward")} <= with_products
    assert ("head", "backward") in with_products
    assert {"optimizer", "loss", "embedding"} <= set(parts)
    assert parts.get("other", 0) < 0.01 * cost.total_cycles
    assert not any(part == "optimizer" for part, _ in with_products)


LOOPS = """
%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  ROOT %r = (s32[], f32[8]{0:T(128)}) tuple(%next, %x)
}

%going (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0:T(128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

%until (q: (s32[], f32[8])) -> pred[] {
  %q.1 = (s32[], f32[8]{0:T(128)}) parameter(0)
  %j.1 = s32[]{:T(128)} get-tuple-element(%q.1), index=0
  ROOT %unlike = pred[]{:T(512)} custom-call(%j.1), custom_call_target="Decide"
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %first = s32[]{:T(128)} constant(3)
  %copied = s32[]{:T(128)} copy(%first)
  %t = (s32[], f32[8]{0:T(128)}) tuple(%copied, %a)
  %known = (s32[], /*index=1*/f32[8]{0:T(128)(2,1)S(1)}) while(%t), condition=%going, body=%inner
  %open = (s32[], f32[8]{0:T(128)}) while(%known), condition=%until, body=%inner
  ROOT %out = f32[8]{0:T(128)} get-tuple-element(%open), index=1
}
"""


def test_trip_counts_follow_start_step_and_limit() -> None:
    module = parse_module(LOOPS)
    known, unknown = (i for i in module.computations["main"] if i.opcode == "while")
    assert trip_count(module, "main", known) == 5  # 3, 5, 7, 9, 11
    assert trip_count(module, "main", unknown) is None


KERNEL = """
ENTRY %main (a: bf16[4,256,128]) -> bf16[4,256,128] {
  %a = bf16[4,256,128]{2,1,0} parameter(0)
  ROOT %k.1 = bf16[4,256,128]{2,1,0:T(8,128)(2,1)} custom-call(%a), \
custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[4,256,128]{2,1,0}}, \
frontend_attributes={kernel_metadata={
}}, metadata={op_name="jit(f)/language_model/model/block_0/self_attn/splash_mha_fwd/pallas_call"}
}
"""


def test_kernels_are_listed_with_shapes() -> None:
    (call,) = program_cost(parse_module(KERNEL)).kernels
    assert call.name == "splash_mha_fwd"
    assert call.part == "decoder self-attention"
    assert call.operands == call.results == (("bf16", (4, 256, 128)),)
    assert call.calls == 1


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("mesh['a'=8] {'a':(2)2}", (0, 2)),
    ],
)
def test_groups_of_devices(groups: str, first: tuple[int, ...]) -> None:
    text = f"""
ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    module = parse_module(text)
    found = find_collective(module, module.root("main"))
    assert found is not None
    assert (found.group, found.bytes) == (first, 32)


@pytest.mark.parametrize(
    ("topology", "mesh", "links"),
    [
        ("v5e:4x4", "fsdp=16", 2),  # a corner of a plane
        ("v5e:16x16", "fsdp=256", 4),  # rings in both dimensions
        ("v5p:2x2x1", "fsdp=4", 2),
        ("v5p:4x4x4", "fsdp=64", 6),
    ],
)
def test_links_that_an_exchange_has(topology: str, mesh: str, links: int) -> None:
    parsed = parse_topology(topology)
    devices = parsed.mesh(mesh)
    gather = Collective("all-gather", 10**9, tuple(range(devices.size)))
    expected = gather.bytes_sent / links / parsed.chip.link_bandwidth
    assert math.isclose(network_seconds(gather, parsed, devices), expected)


@pytest.mark.parametrize(
    ("topology", "mesh", "pairs", "hops"),
    [
        ("v5e:4x4", "fsdp=4,tensor=4", ((0, 1), (1, 2)), 1),
        ("v5e:4x4", "fsdp=4,tensor=4", ((0, 3),), 3),  # no ring of four
        ("v5p:4x4x4", "data=4,fsdp=4,tensor=4", ((0, 3),), 1),
    ],
)
def test_hops_of_a_permutation(
    topology: str, mesh: str, pairs: tuple[tuple[int, int], ...], hops: int
) -> None:
    parsed = parse_topology(topology)
    devices = parsed.mesh(mesh)
    group = tuple(place for pair in pairs for place in pair)
    seconds = network_seconds(Collective("collective-permute", 10**9, group), parsed, devices)
    assert 0.5 * hops <= seconds * parsed.chip.link_bandwidth / 10**9 <= hops


@pytest.mark.parametrize(
    ("op_name", "part", "phase"),
    [
        ("vision_model/transformer/layers/self_attn/q_proj", "vision encoder", "forward"),
        ("language_model/model/layers/block_3/cross_attn/q", "decoder cross-attention", "forward"),
        ("checkpoint/rematted_computation/block_3/mlp/up", "decoder MLPs", "recomputed"),
        ("language_model/lm_head/dot_general", "head", "forward"),
    ],
)
def test_parts(op_name: str, part: str, phase: str) -> None:
    for wrapped in (
        f"jit(train_step)/jvp(Model)/{op_name}",
        f"jit(f)/transpose(jvp(Model))/{op_name}",
    ):
        assert part_of(wrapped) == part
    assert phase_of(f"jit(train_step)/jvp(Model)/{op_name}") == phase
    assert part_of("jit(train_step)/mul") == "optimizer"
    assert part_of("jit(decode)/while/body/sort") == "sampling"


STARTED_AHEAD = """
%starting (p: f32[2,8]) -> (f32[2,8], f32[8,8]) {
  %p = f32[2,8]{1,0} parameter(0)
  %g.1 = f32[8,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, attributes={chain_id="0"}
  ROOT %s = (f32[2,8], f32[8,8]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (q: f32[2,8], w: f32[8,8]) -> (f32[8,8], f32[8,8]) {
  %q = f32[2,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %d.1 = f32[8,8]{1,0} convolution(%w, %w), dim_labels=bf_io->bf
  %g.2 = f32[8,8]{1,0} all-gather(%q), replica_groups={{0,1,2,3}}, attributes={chain_id="0"}
  ROOT %t = (f32[8,8]{1,0}, f32[8,8]{1,0}) tuple(%d.1, %g.2)
}

%all-reduce-scatter.1 (r: f32[8,8]) -> f32[2,8] {
  %r = f32[8,8]{1,0} parameter(0)
  %sum = f32[8,8]{1,0} all-reduce(%r), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %part = f32[2,8]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={2,8}
}

%elsewhere (w: f32[8,8]) -> f32[8,8] {
  %w = f32[8,8]{1,0} parameter(0)
  ROOT %s.3 = f32[8,8]{1,0} all-reduce(%w), replica_groups={{0,1,2,3}}, to_apply=%add
}

%cheap (c: f32[8,8]) -> f32[8,8] {
  %c = f32[8,8]{1,0} parameter(0)
  ROOT %n.1 = f32[8,8]{1,0} negate(%c), backend_config={"estimated_cycles":"10"}
}

%dear (e: f32[8,8]) -> f32[8,8] {
  %e = f32[8,8]{1,0} parameter(0)
  ROOT %n.2 = f32[8,8]{1,0} negate(%e), backend_config={"estimated_cycles":"1000"}
}

%failing (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8]{1,0} parameter(0)
  ROOT %n.3 = f32[8,8]{1,0} negate(%q), metadata={op_name="jit(f)/vision_model/neg"}, \
backend_config={"estimated_cycles":"9223372036854775807"}
}

%body (v: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %v = (s32[], f32[2,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%v), index=0
  %one = s32[] constant(1)
  %k = s32[] add(%j, %one)
  %h = f32[2,8]{1,0} get-tuple-element(%v), index=1
  %g.3 = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%h), replica_groups=[2,4]<=[8], \
metadata={op_name="layers/self_attn/q_proj"}
  %g.4 = f32[8,8]{1,0} all-gather-done(%g.3)
  ROOT %o = (s32[], f32[2,8]{1,0}) tuple(%k, %h)
}

%more (u: (s32[], f32[2,8])) -> pred[] {
  %u = (s32[], f32[2,8]{1,0}) parameter(0)
  %l = s32[] get-tuple-element(%u), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%l, %three), direction=LT
}

ENTRY %main (a: f32[2,8], b: f32[8,8], i: s32[]) -> f32[2,8] {
  %start = s32[] constant(0)
  %both = (s32[], f32[2,8]{1,0}) tuple(%start, %a)
  %loop = (s32[], f32[2,8]{1,0}) while(%both), condition=%more, body=%body, \
metadata={op_name="jit(f)/vision_model/transformer/while"}
  %a = f32[2,8]{1,0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %f.1 = (f32[2,8], f32[8,8]) fusion(%a), kind=kCustom, calls=%starting
  %f.2 = (f32[8,8], f32[8,8]) fusion(%a, %b), kind=kOutput, calls=%meanwhile, \
metadata={op_name="jit(f)/language_model/model/layers/block_1/mlp/up_proj"}, \
backend_config={"estimated_cycles":"500"}
  %y = f32[8,8]{1,0} get-tuple-element(%f.2), index=0
  %z = f32[8,8]{1,0} conditional(%i, %y, %y), branch_computations={%dear, %cheap}
  %w.1 = f32[8,8]{1,0} call(%z), to_apply=%failing
  %s.1 = (f32[8,8], f32[2,8], u32[]) async-start(%z), calls=%elsewhere
  %s.2 = (f32[8,8], f32[2,8]) reduce-scatter-start(%z), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %f.3 = f32[2,8]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_fusions_and_branches() -> None:
    cost = program_cost(parse_module(STARTED_AHEAD))
    assert cost.by_part() == {"decoder MLPs": 500, "other": 10}
    assert [(item.kind, item.cycles) for item in cost.cycles] == [("products", 500), ("vector", 10)]
    # The compiler has no estimate of one operation: it is left out, and said to be.
    assert cost.unestimated == (Unestimated("vision encoder", 1, False),)
    # What goes on meanwhile is the same exchange; a sum of which a part is kept is not a whole one.
    ahead, gather, in_thread, started, scatter = cost.collectives
    assert (ahead.operation, ahead.bytes, ahead.runs) == ("all-gather", 256, 3)
    assert ahead.overlaps
    # Its path starts inside the loop, whose own path says which part it is.
    assert ahead.part == "vision encoder"
    assert (gather.operation, gather.bytes, gather.runs) == ("all-gather", 256, 1)
    assert gather.overlaps
    assert (in_thread.operation, in_thread.bytes, in_thread.overlaps) == ("all-reduce", 256, True)
    assert (started.operation, started.bytes, started.overlaps) == ("reduce-scatter", 256, True)
    assert (scatter.operation, scatter.bytes, scatter.bytes_sent) == ("reduce-scatter", 256, 192)
    assert not scatter.overlaps
