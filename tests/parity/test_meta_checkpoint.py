"""Meta's release in and out, checked by running Meta's own model on the same small checkpoint."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import meta_reference
import meta_release
import ml_dtypes
import numpy as np
import pytest
import torch
from closeness import assert_close
from etils import epath
from hf_reference import randomise
from llama_models.checkpoint import reshard_mp

import mllama_jax as mj
from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import ArrayTensor, LazyTensor, read_whole
from mllama_jax.convert.pipeline import run, write_at_once
from mllama_jax.convert.sources.meta import open_meta
from mllama_jax.convert.sources.source import Source
from mllama_jax.convert.sources.torch_files import read_torch_headers
from mllama_jax.convert.targets.meta import MetaTarget, check_lossless
from mllama_jax.convert.targets.torch_zip import lay_out

pytestmark = pytest.mark.filterwarnings("ignore:.*all_gather_tensor. is deprecated:FutureWarning")

RATIO_IDS = {(1, 1): 1, (1, 2): 2, (1, 3): 3, (1, 4): 4, (2, 1): 5, (2, 2): 6, (3, 1): 7, (4, 1): 8}


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with meta_reference.process_group():
        yield


@pytest.fixture(scope="module")
def reference() -> Any:
    model = meta_release.model()
    randomise(model, 5)
    return model


@pytest.fixture(scope="module")
def tensors(reference: Any) -> meta_release.Tensors:
    return {name: value.clone() for name, value in reference.state_dict().items()}


@pytest.fixture(scope="module")
def release(tensors: meta_release.Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meta") / "release"
    return meta_release.write(folder, [tensors], single=True)


@pytest.fixture(scope="module")
def expected(reference: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return meta_reference.run(reference, meta_release.batch())


def opened(folder: Path) -> Source:
    return open_meta(epath.Path(folder))


def assert_same_values(found: dict[str, LazyTensor], expected: dict[str, LazyTensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        ours, theirs = read_whole(found[name]), read_whole(tensor)
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == theirs.shape, name
        assert ours.tobytes() == theirs.tobytes(), name


def assert_our_model_agrees(folder: Path, features: torch.Tensor, logits: torch.Tensor) -> None:
    model, params = mj.MllamaForConditionalGeneration.from_pretrained(folder)
    batch = meta_release.batch()
    images = {
        "pixel_values": batch.pixels,
        "aspect_ratio_ids": np.array(
            [[RATIO_IDS[tuple(ratio)] for ratio in sample] for sample in batch.ratios.tolist()]
        ),
        "aspect_ratio_mask": (np.arange(4) < batch.ratios.prod(-1)[..., None]).astype(np.int64),
    }

    @jax.jit
    def outputs(params: Any) -> tuple[jax.Array, jax.Array]:
        states = model.apply({"params": params}, **images, method="encode_images")
        output = model.apply(
            {"params": params},
            batch.tokens,
            cross_attention_states=states,
            cross_attention_mask=(batch.mask.numpy() == 0).astype(np.int64),
        )
        return states, output.logits

    ours = outputs(params)
    assert_close(ours[0], features.flatten(1, 3), "features")
    assert_close(ours[1], logits, "logits")


def test_our_model_computes_what_metas_does(release, expected):
    assert_our_model_agrees(release, *expected)


def test_config(release):
    config = opened(release).config
    assert config.text_config.cross_attention_layers == (1, 5)
    assert config.text_config.num_hidden_layers == 7
    assert config.text_config.intermediate_size == 56
    assert config.vision_config.vision_output_dim == 6 * 32
    assert config.image_token_index == 96


def test_shards_that_two_processes_of_metas_model_run(release, tensors, expected, tmp_path):
    folder = meta_release.write(tmp_path / "shards", meta_release.cut(tensors, 2))
    script = Path(__file__).with_name("meta_process.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, folder, str(rank), "2"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    outputs = torch.load(folder / "outputs.pt", weights_only=True)
    assert_close(outputs["features"], expected[0], "features")
    assert_close(outputs["logits"], expected[1], "logits")
    assert_same_values(opened(folder).tensors, opened(release).tensors)


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
def test_shards(release, tensors, tmp_path, size, fuse):
    shards = meta_release.cut(tensors, size)
    if fuse:
        shards = [meta_release.fused(shard) for shard in shards]
    found, whole = opened(meta_release.write(tmp_path / "shards", shards)), opened(release)
    assert_same_values(found.tensors, whole.tensors)
    assert_same_values(found.unused, whole.unused)
    assert found.config == whole.config


@pytest.mark.parametrize("fuse", [False, True], ids=["", "fused"])
def test_shards_that_metas_code_cut(release, tensors, tmp_path, fuse):
    """It leaves a few tensors whole that its model splits."""
    whole = meta_release.fused(tensors) if fuse else tensors
    shards = [reshard_mp([whole], 2, rank) for rank in range(2)]
    found = opened(meta_release.write(tmp_path / "shards", shards))
    assert_same_values(found.tensors, opened(release).tensors)


def target_of(source: Source, folder: Path, dtype: Any = None, **options: Any) -> MetaTarget:
    matched = {name: (name, tensor) for name, tensor in source.tensors.items()}
    check_lossless(matched, source.config)
    return MetaTarget(
        matched,
        source.config,
        folder,
        lambda name: np.dtype(dtype) if dtype else matched[name][1].dtype,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back(tensors, tmp_path, dtype):
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    source = opened(meta_release.write(tmp_path / "release", [tensors]))
    folder = tmp_path / "back"
    target = target_of(source, folder, unused=source.unused)
    write_at_once(target, epath.Path(folder), {})
    file = folder / "consolidated.00.pth"
    found = torch.load(file, mmap=True, weights_only=True)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert all(found[name].dtype == dtype and found[name].is_contiguous() for name in tensors)
    params = json.loads((folder / "params.json").read_text())
    # Of the feed-forward size only its product is known.
    assert {**params, "ffn_dim_multiplier": 0.3, "multiple_of": 8} == meta_release.PARAMS
    assert zipfile.ZipFile(file).testzip() is None
    assert_same_values(opened(folder).tensors, source.tensors)
    assert opened(folder).config == source.config


def test_metas_model_loads_what_is_written(release, expected, tmp_path):
    """Without the table entries that nothing uses, as from a Hugging Face folder."""
    target = target_of(opened(release), tmp_path / "back")
    write_at_once(target, epath.Path(tmp_path / "back"), {})
    model = meta_release.model()
    state = torch.load(tmp_path / "back/consolidated.00.pth", weights_only=True)
    model.load_state_dict(state, strict=True)
    for ours, theirs in zip(meta_reference.run(model, meta_release.batch()), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kept", [0, 1, 100, -1, None])
def test_resumed(release, tmp_path, kept):
    source = opened(release)
    whole, folder = tmp_path / "whole", tmp_path / "resumed"
    write_at_once(target_of(source, whole), epath.Path(whole), {})
    first = target_of(source, folder)
    first.start(())
    done = [output.name for output in first.outputs[:kept]]
    for output in first.outputs[: len(done) + 1]:
        blocks = output.blocks if output.name in done else output.blocks[:1]
        for region in blocks:
            first.write(output, region, np.ascontiguousarray(output.values.read(region)))
    first.close()
    second = target_of(source, folder)
    second.start(done)
    run(second, done=done, workers=1, on_bytes=lambda _: None, on_flushed=lambda _: None)
    second.finish({})
    name = "consolidated.00.pth"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_files_beyond_4_gib(tmp_path):
    """Of which nearly all is a hole."""
    shapes = {"a": ((2**31 + 5,), ml_dtypes.bfloat16), "b": ((2, 3), np.float32)}
    layout = lay_out("made", {name: (shape, np.dtype(d)) for name, (shape, d) in shapes.items()})
    last = np.array([5, 6, 7], ml_dtypes.bfloat16)
    file = tmp_path / "made.pth"
    with file.open("wb") as stream:
        stream.write(layout.preamble)
        for record, data in zip(
            layout.records, (last, np.arange(6, dtype=np.float32)), strict=True
        ):
            stream.write(record.header)
            stream.seek(record.num_bytes - data.nbytes, os.SEEK_CUR)
            stream.write(data.tobytes() + record.trailer(0))
            assert stream.tell() == record.end
        stream.write(layout.ending([0, 0]))
    found = torch.load(file, mmap=True, weights_only=True)
    ours = read_torch_headers(epath.Path(file))
    assert found["a"][-3:].tolist() == [5, 6, 7]
    assert ours["a"].read((slice(2**31 + 2, 2**31 + 5),)).tolist() == [5, 6, 7]
    assert found["b"].tolist() == read_whole(ours["b"]).tolist() == [[0, 1, 2], [3, 4, 5]]


def changed(tensors: meta_release.Tensors, tmp_path: Path, **changes: Any) -> Path:
    """A release with some tensors replaced, and those that are None left out."""
    return meta_release.write(
        tmp_path / "changed",
        [{k: v for k, v in {**tensors, **changes}.items() if v is not None}],
    )


def test_gates_stored_once_for_every_channel(release, tensors, tmp_path):
    name = "text_model.cross_attention_layers.{}.gate_attn"
    gates = {
        name.format(0): tensors[name.format(0)].expand(64).clone(),
        name.format(1): tensors[name.format(1)].view(1, 1, 1),
    }
    folder = changed(tensors, tmp_path, **gates)
    assert_same_values(opened(folder).tensors, opened(release).tensors)
    gates[name.format(0)][7] += 1
    torch.save({**tensors, **gates}, folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"0\.gate_attn: a gate of different values"):
        read_whole(opened(folder).tensors["language_model.model.layers.1.cross_attn_attn_gate"])


def test_wrong_tensors_are_all_named(tensors, tmp_path):
    folder = changed(
        tensors,
        tmp_path,
        **{
            "text_model.norm.weight": None,
            "text_model.norms.weight": tensors["text_model.norm.weight"],
            "text_model.layers.2.attention.wq.weight": torch.zeros(60, 64),
            "text_model.layers.3.attention.wqkv.weight": torch.zeros(65, 64),
            "text_model.learnable_embedding.weight": torch.zeros(8, 64).half(),
        },
    )
    with pytest.raises(CheckpointError) as error:
        opened(folder)
    message = str(error.value)
    assert "text_model.norm.weight   (nearest that is there: text_model.norms.weight)" in message
    assert "layers.2.attention.wq.weight: found (60, 64), expected (64, 64)" in message
    assert "shape (65, 64) does not divide in the ratio (2, 1, 1)" in message
    assert "learnable_embedding.weight: dtype float16" in message


def test_shards_that_disagree(tensors, tmp_path):
    shards = meta_release.cut(tensors, 2)
    shards[1]["text_model.norm.weight"] = shards[1]["text_model.norm.weight"] + 1
    source = opened(meta_release.write(tmp_path / "shards", shards))
    with pytest.raises(CheckpointError, match=r"text_model\.norm\.weight: the values in shard 1"):
        read_whole(source.tensors["language_model.model.norm.weight"])
    del shards[1]["text_model.output.weight"]
    with pytest.raises(CheckpointError, match=r"output\.weight: absent from consolidated\.01\.pth"):
        opened(meta_release.write(tmp_path / "other", shards))


def test_absent_and_doubled_files(tensors, tmp_path):
    folder = meta_release.write(tmp_path / "shards", meta_release.cut(tensors, 4))
    (folder / "consolidated.02.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"4 shards, but consolidated\.02\.pth"):
        opened(folder)
    (folder / "consolidated.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="two checkpoints in one folder"):
        opened(folder)
    (folder / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"params\.json"):
        opened(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_chunk_size": None}, "lacks vision_chunk_size: not a Llama 3.2 Vision model"),
        ({"quantization_args": {"scheme": "int4"}}, "quantised"),
        ({"n_layers": "5"}, "n_layers='5': expected positive integers"),
        ({"ffn_dim_multiplier": "1"}, "ffn_dim_multiplier='1'"),
        ({"n_heads": 7}, "num_attention_heads=7"),
    ],
)
def test_unusable_params(tensors, tmp_path, changes, message):
    folder = meta_release.write(tmp_path / "release", [tensors])
    params = {**meta_release.PARAMS, **changes}
    params = {name: value for name, value in params.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match=message):
        opened(folder)


def test_params_of_the_released_model():
    """Of 11B: what Meta's params.json says, and Hugging Face's config.json."""
    from mllama_jax.convert.meta_params import config_of, params_of

    params = {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 1024,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "vision_chunk_size": 560,
        "vision_max_num_chunks": 4,
        "vision_num_cross_attention_layers": 8,
    }
    scaling = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    text = {"rope_scaling": scaling, "eos_token_id": [128001, 128008, 128009]}
    assert config_of(params) == mj.MllamaConfig({"image_size": 560}, text)
    assert params_of(config_of(params)) == params


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("vision_config", {"attention_heads": 8}, "num_attention_heads=8: Meta's code has 16"),
        ("text_config", {"cross_attention_layers": [1, 4]}, r"layers=\(1, 4\): Meta's code has"),
        ("text_config", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_configs_that_metas_layout_cannot_hold(release, tmp_path, part, changes, message):
    source = opened(release)
    values = source.config.to_dict()
    values[part] |= changes
    matched = {name: (name, tensor) for name, tensor in source.tensors.items()}
    with pytest.raises(ValueError, match=message):
        check_lossless(matched, mj.MllamaConfig.from_dict(values))


def test_tables_that_metas_layout_cannot_hold(release):
    source = opened(release)
    matched = {name: (name, tensor) for name, tensor in source.tensors.items()}
    name = "vision_model.pre_tile_positional_embedding.embedding.weight"
    table = read_whole(source.tensors[name]).reshape(9, 4, 32).copy()
    table[6, 2, 5] += 1  # of 2 x 2 tiles the third: the same place as the second of (2, 1)
    table[0, 1, 3] = 1
    table[2, 3, 0] = 1
    matched[name] = "stored.name", ArrayTensor(table.reshape(9, 4 * 32))
    with pytest.raises(ValueError, match=r"stored\.name") as error:
        check_lossless(matched, source.config)
    assert "(6, 2)" in str(error.value)
    assert "(0, 1), (2, 3) are tiles that do not exist" in str(error.value)


def test_only_whole_models_have_a_layout_of_metas(release, tmp_path):
    source = opened(release)
    with pytest.raises(ValueError, match="only whole models"):
        MetaTarget({}, source.config.text_config, tmp_path, lambda name: np.dtype(np.float32))
