"""The table of what is split over what, on meshes of the released models' size; no devices."""

import flax.traverse_util
import jax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import mllama_jax as mj
from mllama_jax import sharding
from mllama_jax.plan.topology import parse_topology
from mllama_jax.sharding import (
    describe,
    num_parts,
    param_axes,
    param_shardings,
    parse_mesh,
    partition_spec,
)

MODEL = mj.MllamaForConditionalGeneration(mj.MllamaConfig())
BLOCK = "language_model/model/layers/block_3"


def mesh(**sizes: int) -> AbstractMesh:
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


def specs(**sizes: int) -> dict[str, P]:
    leaves = flax.traverse_util.flatten_dict(param_shardings(MODEL, mesh(**sizes)))
    return {"/".join(path): leaf.spec for path, leaf in leaves.items()}


def test_parameters_of_the_11b_model():
    found = specs(tensor=4, data=2, fsdp=16)
    expected = {
        "language_model/model/embed_tokens/embedding": P("tensor", "fsdp"),
        "language_model/lm_head/kernel": P(None, ("fsdp", "tensor")),
        "language_model/model/norm/scale": P(None),
        f"{BLOCK}/cross_attn/q_proj/kernel": P(None, "fsdp", "tensor", None),
        f"{BLOCK}/cross_attn/k_proj/kernel": P(None, "fsdp", "tensor", None),
        f"{BLOCK}/cross_attn/o_proj/kernel": P(None, "tensor", None, "fsdp"),
        f"{BLOCK}/cross_attn/q_norm/scale": P(None, None),
        f"{BLOCK}/cross_attn_attn_gate": P(None, None),
        f"{BLOCK}/mlp/up_proj/kernel": P(None, "fsdp", "tensor"),
        f"{BLOCK}/mlp/down_proj/kernel": P(None, "tensor", "fsdp"),
        "multi_modal_projector/kernel": P("tensor", "fsdp"),
        "multi_modal_projector/bias": P("fsdp"),
        "vision_model/patch_embedding/kernel": P(None, None, None, "fsdp"),
        "vision_model/gated_positional_embedding/tile_embedding": P(None, None, None, "fsdp"),
        "vision_model/transformer/layers/mlp/fc1/kernel": P(None, "fsdp", "tensor"),
        "vision_model/transformer/layers/mlp/fc1/bias": P(None, "tensor"),
        "vision_model/transformer/layers/mlp/fc2/bias": P(None, "fsdp"),
        "vision_model/global_transformer/layers/gate_attn": P(None, None),
    }
    assert {name: found[name] for name in expected} == expected
    shapes = flax.traverse_util.flatten_dict(MODEL.param_shapes())
    assert found.keys() == {"/".join(path) for path in shapes}
    # Whatever is large is split over both but the table of tile positions, which has no such axis.
    for path, leaf in shapes.items():
        if leaf.size > 2**24 and "tile_embedding" not in path:
            assert {"fsdp", "tensor"} <= set(flat(found["/".join(path)])), path


def flat(spec: P) -> list[str | None]:
    """The mesh axes of a spec; two may stand together."""
    return [axis for item in spec for axis in (item if isinstance(item, tuple) else (item,))]


def test_axes_that_the_mesh_lacks_split_nothing():
    assert specs(fsdp=8)["language_model/lm_head/kernel"] == P(None, "fsdp")
    assert specs(tensor=8)["language_model/lm_head/kernel"] == P(None, "tensor")
    assert set(specs(data=8).values()) == {P(*[None] * n) for n in (1, 2, 3, 4)}


def test_stacked_layers_are_never_split():
    axes = flax.traverse_util.flatten_dict(param_axes(MODEL))
    found = specs(data=2, fsdp=2, tensor=2)
    stacked = ["/".join(path) for path, names in axes.items() if "layers" in path]
    assert len(stacked) > 40
    assert all(axes[tuple(name.split("/"))][0] == "layers" for name in stacked)
    assert {found[name][0] for name in stacked} == {None}


def test_fewer_heads_than_devices_stay_whole():
    axes = ("embed", "kv_heads", "head_dim")
    assert partition_spec(axes, (4096, 8, 128), mesh(tensor=8)) == P(None, "tensor", None)
    assert partition_spec(axes, (4096, 8, 128), mesh(tensor=32)) == P(None, None, None)
    with pytest.raises(ValueError, match="axis kv_heads of size 8 is not divisible by tensor=12"):
        partition_spec(axes, (4096, 8, 128), mesh(tensor=12))
    with pytest.raises(ValueError, match="axis heads of size 32 is not divisible by tensor=64"):
        partition_spec(("embed", "heads", "head_dim"), (4096, 32, 128), mesh(tensor=64))


def test_small_batches_and_odd_embeddings_are_split_as_far_as_it_goes():
    embedding = "language_model/model/embed_tokens/embedding"
    assert specs(fsdp=2, tensor=8)[embedding] == P("tensor", "fsdp")
    assert specs(fsdp=2, tensor=16)[embedding] == P(None, "fsdp")  # 128264 = 8 · 16033
    for size, split in [(8, ("data", "fsdp")), (6, "data"), (2, "data"), (1, None), (3, None)]:
        assert partition_spec(("batch",), (size,), mesh(data=2, fsdp=4)) == P(split)


def test_number_of_parts():
    found = [num_parts("batch", size, mesh(data=2, fsdp=4, tensor=3)) for size in (0, 16, 6, 3)]
    assert found == [8, 8, 2, 1]
    assert num_parts("sampled", 24, mesh(data=2, fsdp=4, tensor=3)) == 24
    assert num_parts("batch", 16, None) == 1


def test_indivisible_parameters_are_named_together():
    whole = "the parameters can't be split over the mesh fsdp=3,tensor=5:\n"
    with pytest.raises(ValueError, match=whole) as error:
        specs(fsdp=3, tensor=5)
    text = str(error.value)
    assert "axis mlp of size 14336 is not divisible by tensor=5: language_model/" in text
    assert "axis embed of size 4096 is not divisible by fsdp=3: language_model/" in text
    assert "axis vision_embed of size 1280 is not divisible by fsdp=3: vision_model/" in text


def test_two_axes_on_one_mesh_axis_are_refused(monkeypatch):
    monkeypatch.setitem(sharding.SPLIT_OVER, "mlp", ("fsdp",))
    with pytest.raises(ValueError, match=r"axes embed and mlp are both on fsdp: .*gate_proj"):
        specs(fsdp=2)


def test_names_that_the_table_lacks_are_refused():
    with pytest.raises(
        ValueError, match="axis width is not one of layers, batch, sampled, gathered_batch, len"
    ):
        partition_spec(("width",), (4,), mesh(fsdp=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (mesh(model=8), "unknown axes model; expected some of data, fsdp, tensor"),
        (AbstractMesh((8,), ("fsdp",), (AxisType.Explicit,)), "needs Auto: use .*parse_mesh"),
    ],
)
def test_other_meshes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        param_shardings(MODEL, wrong)


def test_a_written_mesh_has_the_tables_order():
    one = jax.devices()[:1]
    found = parse_mesh("tensor=1, fsdp=-1,data=1", one)
    assert found.axis_names == ("data", "fsdp", "tensor")
    assert dict(found.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert set(found.axis_types) == {AxisType.Auto}
    assert dict(parse_mesh("fsdp=1", one).shape) == {"fsdp": 1}


@pytest.mark.parametrize(
    "text", ["", "fsdp", "fsdp=x", "fsdp=1,fsdp=1", "model=1", "fsdp=1;data=1"]
)
def test_a_mesh_is_written_as_axis_and_size(text):
    with pytest.raises(ValueError, match="is not of the form axis=size with each of data, fsdp"):
        parse_mesh(text, jax.devices()[:1])


@pytest.mark.parametrize(
    "text", ["fsdp=2", "fsdp=0", "fsdp=0,data=-1", "fsdp=-2", "fsdp=-1,data=-1"]
)
def test_a_mesh_takes_all_devices(text):
    with pytest.raises(ValueError, match="expected positive sizes whose product is 1, the number"):
        parse_mesh(text, jax.devices()[:1])


# Where the devices of a mesh stand ---------------------------------------------------------------


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:4x4x4"])
def test_axes_follow_the_torus(topology):
    for row in parse_topology(topology).mesh("fsdp=-1,tensor=4").devices:
        moved = [len({device.coords[dim] for device in row}) > 1 for dim in range(3)]
        assert sum(moved) == 1


@pytest.mark.parametrize("text", ["data=2,fsdp=8", "data=4,fsdp=2,tensor=2", "data=16"])
def test_only_data_goes_over_the_network_between_slices(text):
    devices = parse_topology("v5e:2x4*2").mesh(text).devices
    first, second = devices[: len(devices) // 2], devices[len(devices) // 2 :]
    assert {device.slice_index for device in first.flat} == {0}
    assert {device.slice_index for device in second.flat} == {1}


@pytest.mark.parametrize("text", ["fsdp=16", "data=1,fsdp=16", "tensor=8,fsdp=2"])
def test_other_axes_between_slices_are_refused(text):
    with pytest.raises(ValueError, match=r"16 devices are 2 slices, .* data to be a multiple of 2"):
        parse_topology("v5e:2x4*2").mesh(text)


def test_a_mesh_is_described_in_a_line():
    assert describe(parse_topology("v5e:2x4*2").mesh("data=2,fsdp=8")) == (
        "mesh data=2,fsdp=8 over 16 TPU v5e devices (2 slices of 8): parameters split 8 ways, "
        "batch split 16 ways"
    )
    assert describe(parse_topology("v6e:2x2").mesh("tensor=4")) == (
        "mesh tensor=4 over 4 TPU v6e devices: parameters split 4 ways, batch whole"
    )
    assert describe(parse_mesh("fsdp=1", jax.devices()[:1])) == (
        "mesh fsdp=1 over 1 cpu device: parameters whole, batch whole"
    )
