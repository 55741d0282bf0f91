"""What `inspect` says of small checkpoints, sound ones and each kind of odd one."""

import hashlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tiny_checkpoint import VISION, arrays, random_params, save_tensors, tiny_config

import mllama_jax as mj
from mllama_jax.cli import main
from mllama_jax.convert import CheckpointError, open_source, save_params
from mllama_jax.convert.inspection import bytes_to_read, inspect
from mllama_jax.convert.table import LAYOUTS, spelled, tensors
from mllama_jax.convert.values import Values, values_of

COMPANIONS = (
    *("generation_config.json", "preprocessor_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "chat_template.jinja"),
)
LM = "language_model."
LAYER = f"{LM}model.layers."
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A whole float32 model with all that belongs to it."""
    folder = tmp_path_factory.mktemp("sound")
    config = tiny_config()
    save_params(random_params(config), config, folder, "model")
    for name in COMPANIONS:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def changed(sound, tmp_path) -> Callable[..., Path]:
    """Makes a folder like the sound one with other tensors."""

    def changed(change: Callable[[Tensors], Tensors | None] = lambda _: None) -> Path:
        values = {name: array.copy() for name, array in arrays(sound).items()}
        folder = tmp_path / "changed"
        save_tensors(change(values) or values, sound, folder)
        for name in COMPANIONS:
            (folder / name).write_text("{}")
        return folder

    return changed


def kinds(folder: Path, **options) -> dict[str, str]:
    """Kind -> text of what is odd."""
    oddities = inspect(folder, **options).oddities
    assert len({oddity.kind for oddity in oddities}) == len(oddities)
    return {oddity.kind: oddity.text for oddity in oddities}


def test_a_sound_checkpoint(sound):
    read: list[int] = []
    found = inspect(sound, progress=read.append)
    assert found.oddities == ()
    assert found.notes == ()
    assert sum(read) == bytes_to_read(open_source(sound))
    assert (found.format, found.layout) == ("Hugging Face, safetensors", "Hub")
    assert (found.component, found.released_as) == ("model", ())
    assert found.dimensions["image size"] == VISION["image_size"]
    stored = arrays(sound)
    assert found.total.tensors == len(stored)
    assert found.total.parameters == sum(array.size for array in stored.values())
    assert found.total.dtypes == {"float32": 4 * found.total.parameters}
    cross = [
        array for name, array in stored.items() if name.startswith((f"{LAYER}1.", f"{LAYER}4."))
    ]
    parts = {part.name: part for part in found.parts}
    assert "not of the model" not in parts
    assert parts["cross-attention layers"].parameters == sum(array.size for array in cross)
    head = [f"{LM}lm_head.weight", f"{LM}model.norm.weight"]
    assert parts["final norm and head"].parameters == sum(stored[name].size for name in head)
    assert sum(part.bytes for part in found.parts) == found.total.bytes
    assert found.files == {"model.safetensors": (sound / "model.safetensors").stat().st_size}


@pytest.mark.parametrize("layout", list(LAYOUTS)[:2])
def test_the_layout_of_names(changed, layout):
    folder = changed(lambda t: {spelled(name, layout): array for name, array in t.items()})
    assert inspect(folder).layout == layout
    assert kinds(folder) == {}


@pytest.mark.parametrize("component", ["language_model", "text_model", "vision_model"])
def test_a_part(tmp_path, component):
    config = tiny_config()
    save_params(random_params(config, component), config, tmp_path, component)
    for name in COMPANIONS:
        (tmp_path / name).write_text("{}")
    found = inspect(tmp_path)
    assert (found.component, found.oddities) == (component, ())
    assert found.layout is not None
    assert found.layout.startswith(found.architecture)


def rename(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {name.replace(old, new): array for name, array in t.items()}


def test_names_and_shapes_are_listed_together(changed):
    def change(t: Tensors) -> None:
        del t[f"{LAYER}2.mlp.up_proj.weight"], t[f"{LAYER}3.mlp.up_proj.weight"]
        t["extra.weight"] = np.ones(3, np.float32)
        t[f"{LM}model.norm.weight"] = np.ones(7, np.float32)

    folder = changed(change)
    found = kinds(folder)
    assert found.keys() == {"tensors"}
    assert f"{LAYER}{{2-3}}.mlp.up_proj.weight" in found["tensors"]
    assert "unexpected (1):\n  extra.weight" in found["tensors"]
    assert "found (7,), expected (24,)" in found["tensors"]
    assert {part.name: part.parameters for part in inspect(folder).parts}["not of the model"] == 3


def test_names_of_two_layouts(changed):
    assert "layout" in kinds(
        changed(rename(f"{LM}model.layers.0.", "model.language_model.layers.0."))
    )


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [(f"{LM}model.embed_tokens.weight", 61, 69), (f"{LM}lm_head.weight", 69, 61)],
)
def test_the_image_tokens_rows(changed, name, rows, expected):
    found = kinds(changed(lambda t: t.update({name: np.ones((rows, 24), np.float32)})))
    assert found.keys() == {"tensors", "vocabulary"}
    assert f"{name} has {rows} rows, expected {expected}" in found["vocabulary"]


def cast(prefix: str, dtype: type) -> Callable[[Tensors], Tensors]:
    return lambda t: {
        name: array.astype(dtype) if name.startswith(prefix) else array for name, array in t.items()
    }


def test_dtypes_may_differ_between_parts_and_not_within_one(changed):
    assert kinds(changed(cast("vision_model.", np.float16))) == {}
    found = kinds(changed(cast(f"{LAYER}1.mlp.", ml_dtypes.bfloat16)))
    assert found.keys() == {"dtypes"}
    assert found["dtypes"].startswith("language_model is float32, but for\n  bfloat16: ")
    assert f"{LAYER}1.mlp.up_proj.weight" in found["dtypes"]


@pytest.mark.parametrize("field", ["torch_dtype", "dtype"])
def test_a_configuration_that_names_another_dtype(changed, field):
    folder = changed(cast("", np.float16))
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    del config["torch_dtype"]
    for section in ("vision_config", "text_config"):
        config[section][field] = "float16"
    (folder / "config.json").write_text(json.dumps({**config, field: "float16"}))
    assert kinds(folder) == {}
    config["text_config"][field] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    said = f"config.json says text_config.{field} 'bfloat16', but the tensors are float16"
    assert kinds(folder) == {"torch_dtype": said}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_infinity_are_counted_over_layers(changed, dtype):
    def change(t: Tensors) -> Tensors:
        t = cast("", dtype)(t)
        t[f"{LAYER}0.mlp.up_proj.weight"][3, 5:8] = np.nan
        t[f"{LAYER}2.mlp.up_proj.weight"][0, 0] = np.nan
        t["vision_model.class_embedding"][4] = -np.inf
        return t

    folder = changed(change)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": np.dtype(dtype).name}))
    assert kinds(folder) == {
        "nan": f"NaN:\n  {LAYER}{{0,2}}.mlp.up_proj.weight: 4 of {2 * 42 * 24} values",
        "infinity": "infinite:\n  vision_model.class_embedding: 1 of 30 values",
    }
    found = inspect(folder, values=False)
    assert (found.oddities, found.values_read) == ((), False)


def test_zeros(changed):
    def change(t: Tensors) -> None:
        t[f"{LAYER}0.mlp.up_proj.weight"][:] = -0.0
        t["multi_modal_projector.bias"][:] = 0  # as before training, and often after it

    assert kinds(changed(change)) == {"zero": f"nothing but zeros:\n  {LAYER}0.mlp.up_proj.weight"}


def test_gates_of_zero(changed):
    gates = ("cross_attn_attn_gate", "cross_attn_mlp_gate")

    def change(t: Tensors) -> None:
        for name in t:
            if name.endswith(gates):
                t[name][:] = 0

    found = kinds(changed(change))
    assert found.keys() == {"gates"}
    assert "pictures change nothing" in found["gates"]
    assert [line.strip() for line in found["gates"].splitlines()[1:]] == [
        f"{LAYER}{{1,4}}.{gate}" for gate in gates
    ]
    found = kinds(changed(lambda t: t["vision_model.gated_positional_embedding.gate"].fill(0)))
    assert found.keys() == {"gates"}
    assert "pictures" not in found["gates"]


def test_values_beyond_float16(changed):
    largest = np.float32(65504)
    folder = changed(lambda t: t[f"{LM}model.norm.weight"].fill(largest))
    assert kinds(folder) == {}
    folder = changed(lambda t: t[f"{LM}model.norm.weight"].fill(-70000))
    found = kinds(folder)
    assert found.keys() == {"float16"}
    assert f"{LM}model.norm.weight: up to 70000" in found["float16"]


@pytest.mark.parametrize("name", COMPANIONS)
def test_absent_files(changed, name):
    folder = changed()
    (folder / name).unlink()
    found = kinds(folder)
    if name == "tokenizer_config.json":
        assert "no chat template" not in found["files"]
    assert found.keys() == {"files"}
    assert name in found["files"]


def test_a_template_among_the_tokenizers_settings(changed):
    folder = changed()
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert kinds(folder) == {}


def test_provenance_and_files_that_it_does_not_fit(changed):
    folder = changed()
    weights = (folder / "model.safetensors").read_bytes()
    noted = {"files": {"model.safetensors": {"sha256": hashlib.sha256(weights).hexdigest()}}}
    (folder / "provenance.json").write_text(json.dumps(noted))
    found = inspect(folder)
    assert (found.provenance, found.oddities) == (noted, ())
    assert bytes_to_read(open_source(folder)) > len(weights) > found.total.bytes
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    found = kinds(folder)
    assert found.keys() == {"hash"}
    assert "provenance.json says" in found["hash"]
    assert kinds(folder, values=False) == {}
    (folder / "provenance.json").write_text("[]")
    assert kinds(folder).keys() == {"provenance"}


def test_a_download_that_is_not_what_the_hub_published(changed, tmp_path):
    folder = changed()
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for digest, expected in ((hashlib.sha256(weights).hexdigest(), set()), ("ab" * 32, {"hash"})):
        blob = tmp_path / "blobs" / digest
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(weights)
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors").symlink_to(blob)
        assert kinds(folder).keys() == expected


@pytest.mark.parametrize(
    ("size", "text", "num_bytes"),
    [
        ("11B", {}, 21_340_441_670),
        (
            "90B",
            {
                "hidden_size": 8192,
                "num_hidden_layers": 100,
                "num_attention_heads": 64,
                "intermediate_size": 28672,
                "cross_attention_layers": list(range(3, 100, 5)),
            },
            177_186_710_646,
        ),
    ],
)
def test_the_released_models(tmp_path, size, text, num_bytes):
    """Headers of the full size; the values are a hole in the file.

    The numbers of bytes are the `total_size` of the released indices.
    """
    config = mj.MllamaConfig({"image_size": 560}, text)
    config.save_pretrained(tmp_path)
    header, end = {}, 0
    for tensor in tensors(config, "model"):
        begin, end = end, end + 2 * int(np.prod(tensor.hub_shape))
        entry = {"dtype": "BF16", "shape": tensor.hub_shape, "data_offsets": (begin, end)}
        header[tensor.hub] = entry
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    found = inspect(tmp_path, values=False)
    assert found.released_as == (size,)
    assert found.total.bytes == num_bytes
    assert {oddity.kind for oddity in found.oddities} == {"files"}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_kinds_of_numbers(dtype):
    values = np.random.default_rng(0).normal(scale=30, size=(40, 30)).astype(dtype)
    for view in (values, values.T, -np.abs(values), np.abs(values), values[::3, 4:7], values[:0]):
        assert values_of(view) == Values(largest=np.abs(view.astype(np.float64)).max(initial=0))
    assert values_of(-np.zeros((3, 4), dtype)).all_zero
    if dtype is not np.int8:
        odd = -np.abs(values)
        odd[0, 0], odd[1, :2], odd[2, 3] = np.nan, -np.inf, -np.array(np.nan, dtype)
        rest = np.abs(odd.astype(np.float64))
        assert values_of(odd) == Values(2, 2, rest[np.isfinite(rest)].max())


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``mllama-jax`` in this process; returns what it printed."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["mllama-jax", *map(str, words)])
        main()
        return capsys.readouterr().out

    return run


def test_the_report(run, sound, changed):
    printed = run("inspect", sound)
    total = inspect(sound).total
    assert "Nothing odd." in printed
    assert f"{total.parameters:,}" in printed
    folder = changed(lambda t: t["vision_model.class_embedding"].fill(np.nan))
    assert "vision_model.class_embedding: 30 of 30 values" in run("inspect", folder)
    assert "Nothing odd (values were not read)." in run("inspect", folder, "--headers-only")
    found = json.loads(run("inspect", folder, "--json"))
    assert [oddity["kind"] for oddity in found["oddities"]] == ["nan"]
    assert found["total"]["parameters"] == total.parameters


def test_what_can_not_be_read_is_an_error(run, changed):
    folder = changed()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="truncated"):
        inspect(folder)
    with pytest.raises(SystemExit, match=r"(?s)^mllama-jax: .*truncated"):
        run("inspect", folder)
