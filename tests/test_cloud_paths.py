"""Checkpoints in cloud storage: gcsfs and TensorStore as they are, and a server on this machine."""

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import flax.traverse_util
import numpy as np
import pytest
import safetensors.numpy
import torch
from gcs_server import Gcs
from processor_folders import write_folder
from tiny_checkpoint import arrays, assert_equal_trees, random_params, stored, tiny_config

import mllama_jax as mj
from mllama_jax.convert import (
    CheckpointError,
    convert,
    inspect,
    load_params,
    open_source,
    save_params,
    verify,
)
from mllama_jax.convert.lazy import num_bytes, whole
from mllama_jax.convert.meta_params import config_of

CONFIG = tiny_config()
# At most what is fetched of a file to read its header.
HEADER_BYTES = 2**16
HF, OBJECT = "gs://models/hf", "models/hf/model-00002-of-00004.safetensors"
META = {
    "dim": 64,
    "n_layers": 5,
    "n_heads": 16,
    "n_kv_heads": 8,
    "vocab_size": 96,
    "ffn_dim_multiplier": 0.3,
    "multiple_of": 8,
    "norm_eps": 1e-5,
    "rope_theta": 5e5,
    "use_scaled_rope": True,
    "vision_chunk_size": 28,
    "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 2,
}


@pytest.fixture(scope="module")
def gcs(tmp_path_factory) -> Iterator[Gcs]:
    """The server, with a checkpoint of every format in the bucket `models`."""
    root = tmp_path_factory.mktemp("gcs")
    with Gcs(root) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        _write_checkpoints(root / "models")
        yield server


def _write_checkpoints(folder: Path) -> None:
    write_folder(folder / "hf")
    save_params(random_params(CONFIG), CONFIG, folder / "hf", "model", max_shard_size=100_000)
    tensors = arrays(folder / "hf")
    convert(folder / "hf", folder / "orbax", to="orbax")
    (folder / "torch").mkdir()
    state = {name: torch.from_numpy(values.copy()) for name, values in tensors.items()}
    torch.save(state, folder / "torch" / "pytorch_model.bin")
    shutil.copy(folder / "hf" / "config.json", folder / "torch")
    _write_meta(folder / "meta", folder / "for_meta")
    (folder / "lora").mkdir()
    module = "language_model.model.layers.0.self_attn.q_proj"
    rows, columns = tensors[f"{module}.weight"].shape
    low_rank = {
        f"base_model.model.{module}.lora_A.weight": np.ones((2, columns), np.float32),
        f"base_model.model.{module}.lora_B.weight": np.ones((rows, 2), np.float32),
    }
    safetensors.numpy.save_file(low_rank, folder / "lora" / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    adapter["base_model_name_or_path"] = HF
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(adapter))


def _write_meta(folder: Path, through: Path) -> None:
    config = config_of(META, 32)
    params = flax.traverse_util.flatten_dict(random_params(config))
    for path, values in params.items():
        if any("tile_" in name for name in path):
            values[...] = 0  # Meta has one value for several of the Hub's
    save_params(flax.traverse_util.unflatten_dict(params), config, through, "model")
    convert(through, folder, to="meta")


@pytest.fixture
def server(gcs: Gcs, monkeypatch) -> Gcs:
    """The same, without memory of what was asked; the client does not wait before it repeats."""
    import gcsfs.retry

    async def no_wait(_: float) -> None:
        pass

    monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=no_wait))
    gcs.begin()
    gcs.faults.clear()
    gcs.closed.clear()
    return gcs


@pytest.mark.parametrize("name", ["hf", "orbax", "torch", "meta", "lora"])
def test_every_format_is_what_it_is_on_disk(server, name):
    cloud, local = open_source(f"gs://models/{name}"), open_source(server.root / "models" / name)
    assert cloud.config == local.config
    found, expected = (load_params(source, local.config, "model") for source in (cloud, local))
    assert_equal_trees(found, expected)


def test_opening_takes_one_request_a_file(server):
    source = open_source(HF)
    assert server.count("list") == 1
    assert server.count("metadata") == server.count("bucket") == 0
    for file in source.files:
        name = os.fspath(file).removeprefix("gs://")
        assert server.count("media", name) == 1
        assert server.num_bytes[name] == min(HEADER_BYTES, file.stat().length)


def test_a_region_is_one_request_of_its_rows(server):
    name = "vision_model.transformer.layers.1.mlp.fc1.weight"
    cloud = open_source(HF).tensors[name]
    local = open_source(server.root / "models" / "hf").tensors[name]
    for region in (whole(cloud.shape), (slice(3, 8), slice(0, 30)), (slice(9, 12), slice(2, 5))):
        server.begin()
        np.testing.assert_array_equal(cloud.read(region), local.read(region))
        rows = region[0].stop - region[0].start
        assert [r.num_bytes for r in server.asked] == [num_bytes(cloud) // cloud.shape[0] * rows]


def test_a_text_model_fetches_no_vision_tensor(server):
    source = open_source(HF)
    server.begin()
    model, params = mj.MllamaForCausalLM.from_pretrained(HF)
    same, expected = mj.MllamaForCausalLM.from_pretrained(server.root / "models" / "hf")
    assert model == same
    assert_equal_trees(params, expected)
    text = [t for name, t in source.tensors.items() if name.startswith("language_model.")]
    wanted = sum(map(num_bytes, text))
    headers = sum(min(HEADER_BYTES, file.stat().length) for file in source.files)
    sent = {n: count for n, count in server.num_bytes.items() if n.endswith(".safetensors")}
    assert sum(sent.values()) == headers + wanted
    asked = sum(server.count("media", name) for name in sent)
    assert asked == len(source.files) + len(text)


def test_a_checkpoint_is_converted_to_disk(server, tmp_path):
    local = server.root / "models" / "hf"
    report = convert(HF, tmp_path / "out", to="hf", processor=HF)
    assert stored(report.folder) == stored(local)
    assert verify(HF, report.folder).equal
    said = json.loads((report.folder / "provenance.json").read_text())["source"]
    assert said["path"] == HF
    assert said["files"] == {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in local.glob("*.safetensors")
    }
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (report.folder / name).read_bytes() == (local / name).read_bytes()


@pytest.mark.parametrize("kind", [str, Path])
def test_no_result_is_written_to_the_cloud_or_a_folder_named_gs(
    server, tmp_path, monkeypatch, kind
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"gs:/+models/out: .* must be a local one"):
        convert(HF, kind("gs://models/out"))
    assert not list(tmp_path.iterdir())


def test_inspect_says_what_it_says_of_a_folder_on_disk(server):
    cloud, local = inspect(HF).to_json(), inspect(server.root / "models" / "hf").to_json()
    assert cloud.pop("path") == HF
    assert local.pop("path") != HF
    assert cloud == local


def test_processor_and_configuration_come_from_the_cloud(server):
    local = server.root / "models" / "hf"
    chat = [{"role": "user", "content": "Héllo  there"}]
    cloud, here = (mj.MllamaProcessor.from_pretrained(path) for path in (HF, local))
    assert cloud.apply_chat_template(chat) == here.apply_chat_template(chat)
    assert cloud.image_processor == here.image_processor
    assert mj.MllamaConfig.from_pretrained(HF) == mj.MllamaConfig.from_pretrained(local)


def test_a_failed_request_is_repeated(server):
    server.faults[OBJECT] = iter([503, "cut", 429, None, 503, "cut"])
    assert_equal_trees(load_params(HF, CONFIG, "model"), random_params(CONFIG))
    assert next(server.faults[OBJECT], "all happened") == "all happened"


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (503, OSError, "can't be read from the cloud: HttpError: an error made for a test, 503"),
        ("cut", OSError, "can't be read from the cloud: ClientPayloadError"),
        ("whole", OSError, r"answered a request for \d+ bytes with \d+; .*gzip"),
        (403, PermissionError, "may not be read; log in .*gcloud auth"),
        (401, PermissionError, "may not be read; log in"),
        (404, FileNotFoundError, "no such bucket, or nothing of that name"),
    ],
)
def test_lasting_failures_name_the_file(server, fault, error, message):
    source = open_source(HF)
    server.faults[OBJECT] = itertools.repeat(fault)
    with pytest.raises(error, match=f"(?s){re.escape(OBJECT)}.*{message}"):
        load_params(source, CONFIG, "model")


def test_a_file_that_was_cut_short_since_is_noticed(server, tmp_path):
    folder = server.root / "models" / "replaced"
    shutil.copytree(server.root / "models" / "hf", folder)
    source = open_source("gs://models/replaced")
    name, tensor = list(source.tensors.items())[-1]
    file = folder / source.files[-1].name
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=f"{file.name}: ended within {name}"):
        tensor.read(whole(tensor.shape))


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("gs://no-such-bucket/folder", FileNotFoundError, "no such bucket, or nothing of that"),
        ("gs://models/none", FileNotFoundError, "nothing at 'gs://models/none'"),
        ("gs://models/h", FileNotFoundError, "nothing at 'gs://models/h'"),
        ("gs://models/hf/config.json", NotADirectoryError, r"config\.json' is a file"),
        ("gs://closed/hf", PermissionError, "gs://closed/hf: may not be read; log in"),
        ("s3://models/hf", ImportError, "s3://models/hf: a package is absent .* s3fs"),
    ],
)
def test_folders_that_can_not_be_read(server, path, error, message):
    server.closed.add("closed")
    for read in (open_source, mj.MllamaProcessor.from_pretrained, inspect):
        with pytest.raises(error, match=message):
            read(path)
    with pytest.raises(ValueError, match="'gs://models/hf' is a folder, and a folder has no rev"):
        open_source(HF, revision="main")


def test_what_was_copied_there_since_is_found(server):
    whole_one, later = server.root / "models" / "hf", server.root / "models" / "later"
    with pytest.raises(FileNotFoundError, match="nothing at 'gs://models/later'"):
        open_source("gs://models/later")
    shutil.copytree(whole_one, later)
    (later / Path(OBJECT).name).unlink()
    with pytest.raises(CheckpointError, match=f"{Path(OBJECT).name}: named by .*, but absent"):
        open_source("gs://models/later")
    shutil.copy(whole_one / Path(OBJECT).name, later)
    assert len(open_source("gs://models/later").files) == 4


def test_without_gcsfs_the_extra_to_install_is_named():
    code = "import sys; sys.modules['gcsfs'] = None; from mllama_jax.convert import open_source\n"
    found = subprocess.run(
        [sys.executable, "-c", f"{code}open_source({HF!r})"], capture_output=True, text=True
    )
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: gs://models/hf: a package is absent that reads gs://")
    assert last.endswith("pip install 'mllama-jax[gcs]'")
