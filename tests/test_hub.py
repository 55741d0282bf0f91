"""Hub ids, with huggingface_hub's real cache on disk and a server that answers as the hub does."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from etils import epath
from small_hub import COMMIT, NOWHERE, SmallHub, assert_errors, python, serving
from tiny_checkpoint import random_params, stored, tiny_config

from mllama_jax.convert import save_params
from mllama_jax.hub import local_folder

JSON_FILES = ["*.json"]

FIND_FOLDERS = """
import json, sys
from mllama_jax.hub import local_folder

found = []
for hub_id, patterns, revision in json.loads(sys.argv[1]):
    try:
        folder = local_folder(hub_id, allow_patterns=patterns, revision=revision)
        found.append(str(folder))
    except Exception as error:
        found.append([type(error).__name__, str(error)])
print(json.dumps(found))
"""

LOAD_AND_SAVE = """
import sys
import mllama_jax as mj

for revision, output in zip((None, "main", sys.argv[1]), sys.argv[2:], strict=True):
    model, params = mj.MllamaVisionModel.from_pretrained("meta-llama/Tiny-3.2", revision=revision)
    model.save_pretrained(params, output)
"""


def find(*calls: tuple, folder: Path, **environment: object) -> list:
    """The folder, or the error's type and message, of each (hub id, patterns, revision)."""
    return json.loads(python(FIND_FOLDERS, json.dumps(calls), folder=folder, **environment))


def add_to_cache(folder: Path, hub_id: str) -> Path:
    """The folder that huggingface_hub keeps a repository's files of one commit in."""
    repository = folder / "cache" / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_model_is_loaded_from_the_cache_without_a_network(tmp_path):
    config = tiny_config()
    snapshot = add_to_cache(tmp_path, "meta-llama/Tiny-3.2")
    save_params(random_params(config), config, snapshot, "model")
    outputs = [tmp_path / name for name in ("default", "main", "commit")]
    python(LOAD_AND_SAVE, COMMIT, *outputs, folder=tmp_path, HF_HUB_OFFLINE=1)
    expected = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in stored(snapshot).items()
        if name.startswith("vision_model.")
    }
    for output in outputs:
        assert stored(output) == expected


def test_offline_what_the_cache_lacks_is_named(tmp_path):
    (add_to_cache(tmp_path, "owner/name") / "config.json").write_text("{}")
    found = find(
        ("owner/other", JSON_FILES, None),
        ("owner/name", JSON_FILES, "v2"),
        ("owner/name", ["*.safetensors", "*.bin"], None),
        folder=tmp_path,
        HF_HUB_OFFLINE=1,
    )
    expected = [
        ("FileNotFoundError", r"not in the cache at .*offline mode is on .*`hf download owner/oth"),
        ("FileNotFoundError", r"'owner/name' at revision 'v2' is not in the cache"),
        ("FileNotFoundError", r"no file that matches \*\.safetensors, \*\.bin"),
    ]
    assert_errors(found, expected)


def test_without_a_network_the_cache_is_used(tmp_path):
    snapshot = add_to_cache(tmp_path, "owner/name")
    (snapshot / "config.json").write_text("{}")
    calls = [("owner/name", JSON_FILES, None), ("owner/other", JSON_FILES, None)]
    found, *errors = find(*calls, folder=tmp_path)
    assert Path(found) == snapshot
    assert_errors(errors, [("FileNotFoundError", rf"the hub at {NOWHERE} can't be reached")])


def test_a_folder_wins_over_a_hub_id_of_the_same_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    found = local_folder("owner/name", allow_patterns=JSON_FILES)
    assert os.path.samefile(found, tmp_path / "owner" / "name")
    with pytest.raises(ValueError, match=r"revision='main' was given, but 'owner/name' is a fold"):
        local_folder("owner/name", allow_patterns=JSON_FILES, revision="main")


@pytest.mark.parametrize("kind", [str, Path, epath.Path])
def test_existing_folders_are_returned_as_they_are(tmp_path, kind, monkeypatch):
    assert os.path.samefile(local_folder(kind(tmp_path), allow_patterns=["*.none"]), tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.path.samefile(local_folder(kind("~"), allow_patterns=[]), tmp_path)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("", FileNotFoundError, "path is empty"),
        ("missing", FileNotFoundError, r"no folder 'missing' \(looked from .*owner/name"),
        ("/no/such/folder", FileNotFoundError, "not a hub id"),
        ("./a/b", FileNotFoundError, "not a hub id"),
        ("a/b/c", FileNotFoundError, "not a hub id"),
        ("../a", FileNotFoundError, "not a hub id"),
        (Path("owner/name"), FileNotFoundError, "not a hub id"),
        ("file.txt", NotADirectoryError, r"'file\.txt' is a file; expected the folder"),
        ("owner/na--me", FileNotFoundError, "no valid hub id"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, monkeypatch, path, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(error, match=message):
        local_folder(path, allow_patterns=JSON_FILES)


@pytest.fixture
def hub() -> Iterator[SmallHub]:
    files = {"config.json": b'{"a": 1}', "model.safetensors": b"weights", "big.bin": b"x"}
    with serving({"good": files}) as server:
        yield server


def test_only_the_files_asked_for_are_fetched_and_once(hub, tmp_path):
    patterns = ["config.json", "*.safetensors"]
    (folder,) = find(("owner/good", patterns, None), folder=tmp_path, HF_ENDPOINT=hub.endpoint)
    assert Path(folder) == tmp_path / "cache" / "models--owner--good" / "snapshots" / COMMIT
    assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == {
        "config.json": b'{"a": 1}',
        "model.safetensors": b"weights",
    }
    assert not any("big.bin" in path for path in hub.asked)
    hub.asked.clear()
    calls = [("owner/good", patterns, revision) for revision in (None, COMMIT)]
    assert find(*calls, folder=tmp_path, HF_ENDPOINT=hub.endpoint) == [folder, folder]
    assert not any("resolve" in path for path in hub.asked)


def test_refusals_of_the_hub_say_what_to_do(hub, tmp_path):
    calls = [("owner/gated", None), ("owner/none", None), ("owner/good", "v9")]
    found = find(
        *[(hub_id, JSON_FILES, revision) for hub_id, revision in calls],
        folder=tmp_path,
        HF_ENDPOINT=hub.endpoint,
    )
    expected = [
        ("PermissionError", r"'owner/gated' is gated: .*hf auth login"),
        ("FileNotFoundError", r"knows no repository 'owner/none'.*hf auth login"),
        ("FileNotFoundError", r"'owner/good' has no revision 'v9'; expected a branch"),
    ]
    assert_errors(found, expected)
