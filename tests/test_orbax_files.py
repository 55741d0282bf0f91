"""Orbax checkpoints that are read: ours, and those that Orbax's own functions wrote."""

import shutil
from pathlib import Path

import flax.struct
import flax.traverse_util
import numpy as np
import orbax.checkpoint as orbax_v0
import pytest
import tensorstore
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax_folders import CONFIG, DTYPES, write_folders
from tiny_checkpoint import arrays, assert_equal_trees, part_config, random_params, stored

from mllama_jax.convert import CheckpointError, convert, load_params, open_source
from mllama_jax.convert.lazy import read_whole
from mllama_jax.convert.sources.orbax import key_value_store
from mllama_jax.convert.table import COMPONENTS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("orbax"))


@pytest.fixture
def hf(folders):
    return folders[0]


@pytest.fixture
def ours(folders):
    return folders[1]


@pytest.fixture
def copy(ours, tmp_path):
    """Of the float32 checkpoint, to be spoilt."""
    return Path(shutil.copytree(ours / "float32", tmp_path / "copy"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_bit_for_bit(hf, ours, dtype, tmp_path):
    source = open_source(ours / dtype)
    assert (source.format, source.component) == ("Orbax", "model")
    assert source.config == open_source(hf / dtype).config
    assert {file.name for file in source.carried} == {"generation_config.json", "tokenizer.json"}
    expected = arrays(hf / dtype)
    assert source.tensors.keys() == expected.keys()
    for name, tensor in source.tensors.items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.shape == expected[name].shape
        assert read_whole(tensor).tobytes() == expected[name].tobytes()
        part = tuple(slice(size // 3, size - size // 4) for size in tensor.shape)
        assert tensor.read(part).tobytes() == expected[name][part].tobytes()
    convert(ours / dtype, tmp_path / "back", to="hf", max_shard_size="99KB")
    assert stored(tmp_path / "back") == stored(hf / dtype)


@flax.struct.dataclass
class State:
    """As of a training run, with moments in the shape of the parameters."""

    step: np.ndarray
    params: dict
    opt_state: tuple


def save_v1(path: Path, params: dict, ocdbt: bool, zarr3: bool) -> None:
    context = ocp.Context()
    context.array.saving.use_ocdbt = ocdbt
    context.array.saving.use_zarr3 = zarr3
    context.array.saving.use_compression = ocdbt
    with context:
        ocp.save(path, params)


def save_state(path: Path, params: dict) -> None:
    state = State(np.array(3), params, (random_params(CONFIG, seed=9), None))
    ocp.save_checkpointables(path, {"state": state, "counts": {"seen": np.ones(3)}})


def save_standard(path: Path, params: dict) -> None:
    with orbax_v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params)


def save_managed(path: Path, params: dict) -> None:
    with orbax_v0.CheckpointManager(path.absolute()) as manager:
        for step, values in ((9, random_params(CONFIG, seed=8)), (10, params)):
            manager.save(step, args=orbax_v0.args.StandardSave(values))
        manager.wait_until_finished()


SAVERS = {
    "as it comes": ocp.save,
    "zarr3 without OCDBT": lambda path, params: save_v1(path, params, False, True),
    "zarr in OCDBT": lambda path, params: save_v1(path, params, True, False),
    "zarr without OCDBT": lambda path, params: save_v1(path, params, False, False),
    "state": save_state,
    "the older interface": save_standard,
    "steps of the older interface": save_managed,
}


@pytest.mark.parametrize("saver", SAVERS)
def test_what_orbax_saved_is_read(saver, tmp_path):
    params = random_params(CONFIG)
    SAVERS[saver](tmp_path / "saved", params)
    CONFIG.save_pretrained(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    assert source.format == ("Orbax, training state" if saver == "state" else "Orbax")
    assert len(source.notes) == (saver == "state")
    assert_equal_trees(load_params(source, CONFIG, "model"), params)


@pytest.mark.parametrize("component", COMPONENTS)
def test_parts_of_the_model_with_their_own_configuration_or_the_whole(component, tmp_path):
    config = part_config(CONFIG, component)
    params = random_params(config, component)
    ocp.save(tmp_path / "saved", params)
    for settings in (config, CONFIG):
        settings.save_pretrained(tmp_path)
        source = open_source(tmp_path / "saved")
        assert (source.component, source.config) == (component, config)
        assert_equal_trees(load_params(source, config, component), params)
    convert(tmp_path / "saved", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "again")
    assert_equal_trees(ocp.load(tmp_path / "again"), params)


def test_a_checkpoint_without_configuration_says_where_to_put_it(tmp_path):
    ocp.save(tmp_path / "a" / "b" / "saved", random_params(CONFIG))
    CONFIG.save_pretrained(tmp_path)  # too far away to be meant
    with pytest.raises(FileNotFoundError, match=r"saved/config\.json: no such file.*put the model"):
        open_source(tmp_path / "a" / "b" / "saved")


def test_leaves_that_do_not_fit_are_named_together(tmp_path):
    params = flax.traverse_util.flatten_dict(random_params(CONFIG), sep="/")
    norm = "language_model/model/norm/"
    params[f"{norm}scales"] = params.pop(f"{norm}scale")
    params["multi_modal_projector/kernel"] = params["multi_modal_projector/kernel"][1:]
    ocp.save(tmp_path / "saved", flax.traverse_util.unflatten_dict(params, sep="/"))
    CONFIG.save_pretrained(tmp_path / "saved")
    with pytest.raises(CheckpointError) as error:
        open_source(tmp_path / "saved")
    assert str(error.value).splitlines()[1:] == [
        "missing (1):",
        f"  {norm}scale   (nearest that is there: {norm}scales)",
        "unexpected (1):",
        f"  {norm}scales",
        "misshaped (1):",
        "  multi_modal_projector/kernel: found (89, 24), expected (90, 24)",
    ]


def test_folders_that_hold_no_model(tmp_path):
    ocp.save(tmp_path / "other", {"step": np.ones(3)})
    with pytest.raises(CheckpointError, match=r"no parameters of .*the tree has step"):
        open_source(tmp_path / "other")
    both = {"one": random_params(CONFIG), "two": random_params(CONFIG)}
    ocp.save_checkpointables(tmp_path / "several", both)
    with pytest.raises(CheckpointError, match="several trees of arrays: one, two; give"):
        open_source(tmp_path / "several")
    (tmp_path / "run" / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"only unfinished ones: 30\.orbax-checkpoint-tmp"):
        open_source(tmp_path / "run")


def test_unfinished_checkpoints_are_refused(copy):
    for name in ("saved.orbax-checkpoint-tmp", ".state.incomplete"):
        shutil.copytree(copy, copy.parent / name)
        with pytest.raises(CheckpointError, match="is an unfinished checkpoint"):
            open_source(copy.parent / name)
    (copy / "conversion.incomplete").touch()
    open_source(copy)  # it is whole, and only the last step is missing
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match="unfinished conversion; run the same command again"):
        open_source(copy)


def file_of(checkpoint: Path, values: np.ndarray) -> tuple[Path, int]:
    """The file that holds a chunk, and the chunk's place in it."""
    data = values.tobytes()
    found = [
        (file, file.read_bytes().find(data)) for file in (checkpoint / "state" / "d").iterdir()
    ]
    [place] = [(file, at) for file, at in found if at >= 0]
    return place


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "absent"])
def test_a_damaged_array_is_named_when_it_is_read(copy, damage):
    layer = random_params(CONFIG)["language_model"]["model"]["layers"]["block_2"]["mlp"]
    file, start = file_of(copy, layer["up_proj"]["kernel"][1])
    data = bytearray(file.read_bytes())
    if damage == "flipped bit":
        data[start + 1000] ^= 8
        file.write_bytes(data)
    elif damage == "cut short":
        file.write_bytes(data[: start + 1000])
    else:
        file.unlink()
    name = "language_model.model.layers.5.mlp.up_proj.weight"
    # The file may also hold what says where other chunks are, and then nothing can be opened.
    opened = "" if damage == "flipped bit" else "|leaves can't be opened"
    with pytest.raises(
        CheckpointError, match=rf"block_2/mlp/up_proj/kernel\[1\] can't be read{opened}"
    ) as e:
        read_whole(open_source(copy).tensors[name])
    assert "source locations" not in str(e.value)


def test_an_absent_chunk_is_not_taken_for_zeros(tmp_path):
    params = random_params(CONFIG)
    saved = tmp_path / "saved"
    save_v1(saved, params, ocdbt=False, zarr3=False)
    CONFIG.save_pretrained(saved)
    (saved / "state" / "multi_modal_projector.bias" / "0").unlink()
    with pytest.raises(CheckpointError, match="multi_modal_projector/bias can't be read"):
        load_params(saved, CONFIG, "model")


def test_damaged_descriptions_are_named(copy):
    (copy / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"damaged: 75 of 75 leaves can't be opened"):
        open_source(copy)
    for text in ("", "[]", '{"tree_metadata": {"a": 1}}'):
        (copy / "state" / "_METADATA").write_text(text)
        with pytest.raises(CheckpointError, match="_METADATA: damaged"):
            open_source(copy)


@pytest.mark.parametrize("base", ["", "gs://bucket", "s3://bucket"])
def test_folders_as_tensorstore_is_told_of_them(base):
    store = key_value_store(epath.Path(f"{base}/a folder/100% #1"))
    found = tensorstore.KvStore.Spec(store).to_json()
    assert found["path"].strip("/") == "a folder/100% #1"
    assert found["path"].endswith("/")
    assert (found["driver"], found.get("bucket", "")) == {
        "": ("file", ""),
        "gs://bucket": ("gcs", "bucket"),
        "s3://bucket": ("s3", "bucket"),
    }[base]


def test_other_stores_are_refused():
    with pytest.raises(ValueError, match=r"az://a/b: .*local folders, gs:// and s3://"):
        key_value_store(epath.Path("az://a/b"))
