"""Whole checkpoints out of the hub: which files come, from where, and what becomes of failures."""

import hashlib
import json
from pathlib import Path

import pytest
from small_hub import COMMIT, assert_errors, python, serving
from tiny_checkpoint import random_params, stored, tiny_config

from mllama_jax.convert import save_params
from mllama_jax.hub import checkpoint_folder, commit_of, published_sha256

FIND_CHECKPOINTS = """
import json, sys
from mllama_jax.hub import checkpoint_folder, commit_of

found = []
for path, revision in json.loads(sys.argv[1]):
    try:
        folder = checkpoint_folder(path, revision=revision)
        found.append(str(folder))
        assert commit_of(folder)
    except Exception as error:
        found.append([type(error).__name__, str(error)])
print(json.dumps(found))
"""

CONVERT = """
import json, sys
from mllama_jax.convert import convert
from mllama_jax.hub import checkpoint_folder

for number, revision in enumerate(json.loads(sys.argv[2])):
    folder = checkpoint_folder(sys.argv[1], revision=revision)
    try:
        convert(folder, f"{sys.argv[3]}-{number}", to="hf")
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""

FILES = {
    "both": {
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "chat_template.jinja",
        "LICENSE",
        "model.gguf",
        "picture.png",
        "original/params.json",
        "original/tokenizer.model",
        "original/consolidated.00.pth",
        "original/consolidated.01.pth",
        "runs/deep/model.safetensors",
    },
    "torch": {
        "config.json",
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
        "training_args.bin",
        "step-5/adapter_config.json",
        "step-5/adapter_model.bin",
        "step-5/optimizer.bin",
    },
    "orbax": {
        "config.json",
        "_CHECKPOINT_METADATA",
        "state/_METADATA",
        "state/d/0123",
    },
    "other": {"config.json", "model-Q4.gguf"},
}
REPOSITORIES = {
    repository: {name: name.encode() for name in names} for repository, names in FILES.items()
}

WANTED = {
    "owner/both": {"config.json", "model.safetensors", "chat_template.jinja", "LICENSE"},
    "owner/both/original": {
        "params.json",
        "tokenizer.model",
        "consolidated.00.pth",
        "consolidated.01.pth",
    },
    "owner/torch": {
        "config.json",
        "pytorch_model-00001-of-00001.bin",
        "pytorch_model.bin.index.json",
    },
    "owner/torch/step-5": {"adapter_config.json", "adapter_model.bin"},
    "owner/orbax": FILES["orbax"],
}


def find(*calls: tuple[str, str | None], folder: Path, **environment: object) -> list:
    """The folder, or the error's type and message, of each (path, revision)."""
    return json.loads(python(FIND_CHECKPOINTS, json.dumps(calls), folder=folder, **environment))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_weights_of_one_format_are_fetched_once_and_used_offline(tmp_path):
    calls = [(path, revision) for path in WANTED for revision in (None, "next", COMMIT)]
    with serving(REPOSITORIES) as hub:
        found = find(*calls, folder=tmp_path, HF_ENDPOINT=hub.endpoint)
    fetched = [path for path in hub.asked if "/resolve/" in path]
    assert len(fetched) == 2 * sum(map(len, WANTED.values()))  # HEAD and GET
    for (path, _), folder in zip(calls, found, strict=True):
        owner, name, *inside = path.split("/")
        snapshot = tmp_path / "cache" / f"models--{owner}--{name}" / "snapshots" / COMMIT
        assert Path(folder) == snapshot.joinpath(*inside)
        within = f"{inside[0]}/" if inside else ""
        expected = {file: REPOSITORIES[name][within + file] for file in WANTED[path]}
        held = contents(Path(folder))
        assert expected.items() <= held.items()
    top = contents(tmp_path / "cache" / "models--owner--both" / "snapshots" / COMMIT)
    assert top.keys() == WANTED["owner/both"] | {
        f"original/{file}" for file in WANTED["owner/both/original"]
    }
    assert find(*calls, folder=tmp_path, HF_HUB_OFFLINE=1) == found


def test_what_can_not_be_fetched_is_explained(tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"s"}
    calls = [
        ("owner/other", None),
        ("owner/both/missing", None),
        ("owner/both", "v9"),
        ("owner/none/original", None),
        ("owner/gated", None),
        ("owner/locked", None),
    ]
    with serving(REPOSITORIES | {"locked": files}, locked=("locked",)) as hub:
        found = find(*calls, folder=tmp_path, HF_ENDPOINT=hub.endpoint)
    expected = [
        ("FileNotFoundError", r"'owner/other' has no weights that are read: neither \*\.safet"),
        ("FileNotFoundError", r"'owner/both' has no weights that are read in its folder 'missing'"),
        ("FileNotFoundError", r"'owner/both' has no revision 'v9'"),
        ("FileNotFoundError", r"no folder 'owner/none/original' .*no repository 'owner/none'"),
        ("PermissionError", r"'owner/gated' is gated: .*hf auth login"),
        ("PermissionError", r"'owner/locked' is gated: .*hf auth login"),
    ]
    assert_errors(found, expected)
    (found,) = find(("owner/none/original", None), folder=tmp_path, HF_HUB_OFFLINE=1)
    assert_errors([found], [("FileNotFoundError", r"'owner/none' is not in the cache .*offline")])


def test_a_connection_that_breaks_off_is_resumed_by_the_next_call(tmp_path):
    # huggingface_hub keeps what has come in pieces of 10 MiB.
    kept = 10 * 2**20
    weights = bytes(range(256)) * (kept // 256 + 4000)
    files = {"config.json": b"{}", "model.safetensors": weights}
    call = ("owner/good", None)
    with serving({"good": files}) as hub:
        hub.breaks = {"model.safetensors": kept + 1000}
        (error,) = find(call, folder=tmp_path, HF_ENDPOINT=hub.endpoint)
        assert_errors([error], [("OSError", r"'owner/good' broke off: .*call again, and it goes")])
        # Offline, what is there of it is not taken for a checkpoint.
        (error,) = find(call, folder=tmp_path, HF_HUB_OFFLINE=1)
        assert_errors([error], [("FileNotFoundError", "no weights .*cache holds only a part of")])
        hub.asked.clear()
        (folder,) = find(call, folder=tmp_path, HF_ENDPOINT=hub.endpoint)
    assert any(path.endswith(f"model.safetensors bytes={kept}-") for path in hub.asked)
    assert (Path(folder) / "model.safetensors").read_bytes() == weights


def test_a_repository_is_converted_with_its_commit_noted_and_checked(tmp_path):
    config = tiny_config()
    original = tmp_path / "original"
    save_params(random_params(config), config, original, "model", max_shard_size="60KB")
    (original / "tokenizer_config.json").write_text("{}")
    files = {file.name: file.read_bytes() for file in original.iterdir()}
    assert sum(name.endswith(".safetensors") for name in files) > 2
    with serving({"tiny": files}) as hub:
        online = [tmp_path / "online", tmp_path]
        revisions = json.dumps([None, "next"])
        python(
            CONVERT, "owner/tiny", revisions, online[0], folder=tmp_path, HF_ENDPOINT=hub.endpoint
        )
    offline = ("owner/tiny", json.dumps(["main", COMMIT]), tmp_path / "offline")
    python(CONVERT, *offline, folder=tmp_path, HF_HUB_OFFLINE=1)
    results = [tmp_path / f"{kind}-{i}" for kind in ("online", "offline") for i in (0, 1)]
    for result in results:
        assert stored(result) == stored(original)
        assert (result / "tokenizer_config.json").exists()
        provenance = json.loads((result / "provenance.json").read_text())
        assert COMMIT in json.dumps(provenance["source"])
    snapshot = tmp_path / "cache" / "models--owner--tiny" / "snapshots" / COMMIT
    shard = next(snapshot.glob("*.safetensors"))
    assert published_sha256(shard) == hashlib.sha256(files[shard.name]).hexdigest()
    assert published_sha256(snapshot / "config.json") is None
    damaged = bytearray(shard.read_bytes())
    damaged[-3] ^= 1
    shard.write_bytes(damaged)
    found = python(
        *(CONVERT, "owner/tiny", "[null]", tmp_path / "damaged"), folder=tmp_path, HF_HUB_OFFLINE=1
    )
    assert "CheckpointError" in found
    assert "the download is damaged" in found
    assert not (tmp_path / "damaged-0" / "config.json").exists()


def test_what_is_not_in_the_cache_has_no_commit_and_no_hash(tmp_path):
    file = tmp_path / ("0" * 64)
    file.write_bytes(b"")
    assert published_sha256(file) is None
    assert commit_of(tmp_path) is None
    assert commit_of(tmp_path / "snapshots" / "latest") is None
    assert commit_of(tmp_path / "snapshots" / COMMIT / "original") == COMMIT


def test_folders_win_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name" / "original").mkdir(parents=True)
    assert str(checkpoint_folder("owner/name/original")) == "owner/name/original"
    with pytest.raises(ValueError, match="a folder has no revisions"):
        checkpoint_folder("owner/name", revision="main")
    with pytest.raises(FileNotFoundError, match="not a hub id"):
        checkpoint_folder(tmp_path / "owner" / "none")
    with pytest.raises(FileNotFoundError, match="not a hub id"):
        checkpoint_folder("owner/name/too/deep")
