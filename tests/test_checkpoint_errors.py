"""Checkpoints that do not fit the model, and files that are not what they claim."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoint import arrays, random_params, save_tensors, tiny_config

import mllama_jax as mj
from mllama_jax.convert import CheckpointError, save_params
from mllama_jax.convert.sources.shards import find_weights
from mllama_jax.convert.table import spelled

INDEX = "model.safetensors.index.json"
EXPECTED_DTYPES = "expected float32, bfloat16, float16 (quantised?)"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A whole model in one file."""
    folder = tmp_path_factory.mktemp("good")
    save_params(random_params(tiny_config()), tiny_config(), folder, "model")
    return folder


@pytest.fixture
def shards(tmp_path) -> Path:
    """A whole model in several files."""
    save_params(
        random_params(tiny_config()), tiny_config(), tmp_path, "model", max_shard_size="130KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    return tmp_path


def problems(folder: Path, model_cls: type = mj.MllamaForConditionalGeneration) -> list[str]:
    """The lines of the error, without the first."""
    with pytest.raises(CheckpointError) as caught:
        model_cls.from_pretrained(folder)
    first, *lines = str(caught.value).splitlines()
    assert str(folder) in first
    return lines


def test_everything_that_does_not_fit_is_in_one_message(good, tmp_path):
    tensors = arrays(good)
    layer = "language_model.model.layers.{}."
    for i in (0, 1, 2, 4):
        del tensors[layer.format(i) + "mlp.up_proj.weight"]
    norm = "language_model.model.norm.weight"
    tensors["language_model.model.nrm.weight"] = tensors.pop(norm)
    for i in (3, 5):
        tensors[layer.format(i) + "self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
        del tensors[layer.format(i) + "self_attn.q_proj.weight"]
        tensors[layer.format(i) + "self_attn.q_proj.weight"] = np.zeros((24, 25), np.float32)
    tensors["vision_model.patch_embedding.weight"] = np.zeros((30, 147), np.float32)
    head = tensors["language_model.lm_head.weight"]
    tensors["lm_head.weight"] = head
    tensors["multi_modal_projector.bias"] = np.zeros(24, np.int8)
    save_tensors(tensors, good, tmp_path)
    q_proj = layer.format("{3,5}") + "self_attn.q_proj.weight"
    assert problems(tmp_path) == [
        "missing (5):",
        f"  {layer.format('{0-2,4}')}mlp.up_proj.weight",
        f"  {norm}   (nearest that is there: language_model.model.nrm.weight)",
        "unexpected (3):",
        f"  {layer.format('{3,5}')}self_attn.rotary_emb.inv_freq",
        "  language_model.model.nrm.weight",
        "misshaped (3):",
        "  vision_model.patch_embedding.weight: found (30, 147), expected (30, 3, 7, 7)",
        f"  {q_proj}: found (24, 25), expected (24, 24)",
        "unusable (2):",
        f"  multi_modal_projector.bias: dtype int8, {EXPECTED_DTYPES}",
        "  language_model.lm_head.weight: also stored as lm_head.weight",
    ]


def test_missing_names_are_spelled_as_the_folders_are(good, tmp_path):
    layout = "transformers 4.52 and later, in memory"
    tensors = {spelled(name, layout): values for name, values in arrays(good).items()}
    del tensors["model.language_model.norm.weight"]
    save_tensors(tensors, good, tmp_path)
    assert problems(tmp_path) == ["missing (1):", "  model.language_model.norm.weight"]


def test_a_configuration_of_another_size_is_reported_by_shape(good, tmp_path):
    save_tensors(arrays(good), good, tmp_path)
    tiny_config(vocab_size=60, num_hidden_layers=5, cross_attention_layers=(1, 4)).save_pretrained(
        tmp_path
    )
    lines = problems(tmp_path)
    assert "  language_model.lm_head.weight: found (61, 24), expected (60, 24)" in lines
    assert "  language_model.model.layers.5.mlp.up_proj.weight" in lines


def test_a_part_that_the_checkpoint_lacks(good, tmp_path):
    text = {n: v for n, v in arrays(good).items() if n.startswith("language_model.")}
    save_tensors(text, good, tmp_path)
    mj.MllamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no tensor of MllamaVisionModel; found lang"):
        mj.MllamaVisionModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.float8_e4m3fn, np.int8, np.uint8, np.float64, np.int32]
)
def test_quantised_and_other_dtypes_are_refused(good, tmp_path, dtype):
    tensors = arrays(good)
    names = [name for name in tensors if name.endswith("mlp.up_proj.weight")]
    tensors |= {name: tensors[name].astype(dtype) for name in names}
    # The library's numpy functions know no 8-bit floats.
    data = {
        name: values.view(np.uint8) if values.dtype == ml_dtypes.float8_e4m3fn else values
        for name, values in tensors.items()
    }
    save_tensors(data, good, tmp_path)
    if dtype == ml_dtypes.float8_e4m3fn:
        edit_header(tmp_path, lambda h: [h[name].update(dtype="F8_E4M3") for name in names])
    assert problems(tmp_path) == [
        "unusable (6):",
        "  language_model.model.layers.{0-5}.mlp.up_proj.weight: "
        f"dtype {np.dtype(dtype)}, {EXPECTED_DTYPES}",
    ]


def edit_header(folder: Path, edit) -> None:
    """Changes the header of a folder's only file; `edit` is given its contents."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def first(header: dict) -> dict:
    return next(entry for name, entry in header.items() if name != "__metadata__")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda h: first(h).update(dtype="F4"), "dtype 'F4'; expected one of F64, F32"),
        (lambda h: first(h).update(shape=[7]), r"of shape \(7,\) and dtype F32 takes 28 bytes"),
        (lambda h: first(h).update(shape=[-1, -3]), r"damaged header: .*shape \(-1, -3\)"),
        (lambda h: first(h).update(shape=[True]), r"damaged header: .*shape \(True,\)"),
        (lambda h: first(h).update(data_offsets=[0, 1, 2]), "damaged header: ValueError"),
        (lambda h: first(h).pop("dtype"), "damaged header: KeyError"),
        (lambda h: h.update(x=3), "damaged header: TypeError"),
        (
            lambda h: h.update(x={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
            "begins at byte",
        ),
        (
            lambda h: h.update(x={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
            "begins at byte",
        ),
    ],
)
def test_damaged_headers(good, tmp_path, edit, problem):
    save_tensors(arrays(good), good, tmp_path)
    edit_header(tmp_path, edit)
    (line,) = problems(tmp_path)
    assert re.search(rf"model\.safetensors: .*{problem}", line), line


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda data: b"", r"truncated: 0 bytes$"),
        (lambda data: data[:7], r"truncated: 7 bytes$"),
        (lambda data: data[:100], r"truncated: 100 bytes, but the header alone claims \d{4,}$"),
        (lambda data: data[:-1], r"truncated: \d+ bytes, its header says \d+$"),
        (lambda data: data + b"\0", r"too long: \d+ bytes, its header says \d+$"),
        (lambda data: b"\xff" * 8 + data[8:], r"the header alone claims 18446744073709551615$"),
        (lambda data: b"\x80\x02}q\0." * 40, "not a safetensors file"),
        (lambda data: data[:8] + b"\xff" + data[9:], "damaged header: UnicodeDecodeError"),
        (lambda data: data[:8] + b"[" + data[9:], "damaged header: JSONDecodeError"),
        (lambda data: (2).to_bytes(8, "little") + b"[]", "damaged header: .*Error"),
        (lambda data: (9).to_bytes(8, "little") + b"[" * 9, "damaged header: .*Error"),
        (
            lambda data: (100_000).to_bytes(8, "little") + b"[" * 100_000,
            "damaged header: .*Error",
        ),
        (
            lambda data: (15).to_bytes(8, "little") + b'{"a":{},"a":{}}',
            r"damaged header: ValueError\('listed twice: a'\)",
        ),
    ],
)
def test_damaged_files(good, tmp_path, damage, problem):
    save_tensors(arrays(good), good, tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    (line,) = problems(tmp_path)
    assert re.search(problem, line), line


def test_all_damaged_shards_and_absent_files_are_reported_together(shards):
    one, two, three = sorted(shards.glob("*.safetensors"))
    one.write_bytes(one.read_bytes()[:-5])
    two.unlink()
    three.write_bytes(b"<!doctype html>")
    lines = problems(shards)
    assert [re.sub(r"\d+ bytes.*", "…", line) for line in lines] == [
        f"  {two.name}: named by {INDEX}, but absent",
        f"  {one.name}: truncated: …",
        f"  {three.name}: not a safetensors file, or truncated: …",
    ]


def test_an_index_that_disagrees_with_its_files(shards):
    index = json.loads((shards / INDEX).read_text())
    one, _, three = sorted({*index["weight_map"].values()})
    moved = next(name for name, file in index["weight_map"].items() if file == one)
    left_out = next(name for name, file in index["weight_map"].items() if file == three)
    index["weight_map"][moved] = three
    index["weight_map"]["nowhere"] = one
    del index["weight_map"][left_out]
    (shards / INDEX).write_text(json.dumps(index))
    assert problems(shards) == [
        f"  {moved}: {INDEX} puts it in {three}, which does not hold it; {one} does",
        f"  nowhere: {INDEX} puts it in {one}, which does not hold it",
        f"  {left_out}: held by {three}, but {INDEX} does not name it",
    ]


def test_a_tensor_in_two_files(shards):
    one, two, _ = sorted(shards.glob("*.safetensors"))
    tensors = [
        tensor.name
        for tensor in find_weights(shards).tensors.values()
        if tensor.file.name == one.name
    ]
    two.write_bytes(one.read_bytes())
    lines = problems(shards)
    assert f"  {tensors[0]}: held by {one.name} and {two.name}; expected one file" in lines


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\ud83d"],
)
def test_an_unreadable_index(shards, text):
    (shards / INDEX).write_text(text, errors="surrogatepass")
    assert any(line.startswith(f"  {INDEX}: ") for line in problems(shards))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "x.bin", "a/b.safetensors"])
def test_an_index_cannot_lead_out_of_its_folder(shards, name):
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"]["x"] = name
    (shards / INDEX).write_text(json.dumps(index))
    assert problems(shards) == [
        f"  {INDEX}: weight_map may only name *.safetensors of the same folder"
    ]


def test_two_checkpoints_in_one_folder(good, shards):
    (shards / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes())
    (line,) = problems(shards)
    assert "two checkpoints in one folder" in line


def test_shards_without_an_index_are_read(shards, good):
    (shards / INDEX).unlink()
    assert {tensor.name for tensor in find_weights(shards).tensors.values()} == {*arrays(good)}
    mj.MllamaForCausalLM.from_pretrained(shards)


def test_a_folder_without_weights_names_what_it_holds(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"found config\.json, tf_model\.h5$"):
        mj.MllamaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_folder_without_a_configuration(good, tmp_path):
    save_tensors(arrays(good), good, tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        mj.MllamaForConditionalGeneration.from_pretrained(tmp_path)
