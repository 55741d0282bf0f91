"""A run whose output is a bucket: gcsfs and TensorStore as they are, a server on this machine."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from gcs_server import Gcs
from tiny_run import assert_same_end, metrics, write_records, write_start

from mllama_jax.train.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    TrainConfig,
    TrainedConfig,
)
from mllama_jax.train.loop import train

STEPS = 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_in_a_bucket_is_resumed_and_ends_as_one_on_disk(tmp_path, capfd, monkeypatch):
    """After its last checkpoint was lost and the one before it damaged."""
    write_start(tmp_path / "start")
    write_records(tmp_path / "train.jsonl", text_only=False)
    data = DataConfig(str(tmp_path / "train.jsonl"), batch_size=2, lengths=(32,))
    config = TrainConfig(
        output=str(tmp_path / "whole"),
        steps=STEPS,
        log_every=1,
        model=ModelConfig(str(tmp_path / "start")),
        trained=TrainedConfig("lora"),
        data=data,
        checkpoint=CheckpointConfig(every=2, keep=3),
    )
    train(config)
    (tmp_path / "gcs" / "bucket").mkdir(parents=True)
    with Gcs(tmp_path / "gcs") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        run = replace(config, output="gs://bucket/run")
        output = server.root / "bucket" / "run"
        train(run)
        assert_same_end(output, tmp_path / "whole")
        shutil.rmtree(output / "checkpoints" / str(STEPS))
        shutil.rmtree(output / "model")
        largest = max((output / "checkpoints" / "4").rglob("*/d/*"), key=_size)
        largest.write_bytes(largest.read_bytes()[: _size(largest) // 2])
        (output / "metrics.jsonl").write_text((output / "metrics.jsonl").read_text()[:-20])
        _forget_listings()
        train(run)
        said = capfd.readouterr().out
        assert "was moved to gs://bucket/run/damaged_checkpoints/4." in said
        assert f"Going on from step 2 of {STEPS}." in said
        assert (output / "damaged_checkpoints" / "4" / "state").is_dir()
        assert_same_end(output, tmp_path / "whole")
    assert [line["step"] for line in metrics(output)] == list(range(1, STEPS + 1))
    for name in ("adapter/adapter_model.safetensors", "model/tokenizer.json", "speed.jsonl"):
        assert _size(output / name) > 0


def _size(file: Path) -> int:
    return file.stat().st_size


def _forget_listings() -> None:
    """What another process would not know."""
    import gcsfs

    gcsfs.GCSFileSystem.clear_instance_cache()
    from etils.epath import backend

    backend.fsspec_backend.fs("gs://bucket").invalidate_cache()
