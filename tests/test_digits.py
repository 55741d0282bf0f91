"""The committed example model: it sees, and transformers reads the same answers out of it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mllama_jax as mj
from mllama_jax.processing.image_loading import load_image
from mllama_jax.train.config import EvaluationConfig
from mllama_jax.train.data.sources import read_records
from mllama_jax.train.evaluation import answer_records, scores

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"
MODEL = EXAMPLE / "model"
SETTINGS = EvaluationConfig(batch_size=100, max_new_tokens=16)


@pytest.fixture(scope="module")
def model():
    return mj.MllamaForConditionalGeneration.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def processor():
    return mj.MllamaProcessor.from_pretrained(MODEL)


def test_it_reads_digits_that_training_never_saw(model, processor, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    import make_data
    import pictures

    train, held_out = pictures.load_scans()
    assert len(train) + len(held_out) == 1797
    seen = {scan.ink.tobytes() for scan in train}
    assert not any(scan.ink.tobytes() in seen for scan in held_out)
    rng = np.random.default_rng(1)
    drawn = make_data.draw_all(held_out[::2], tmp_path, "held_out", rng, distort=False)
    make_data.write_jsonl(tmp_path / "asked.jsonl", make_data.held_out_records(drawn, rng))
    for name in ("make_data", "pictures", "questions"):
        sys.modules.pop(name)

    records = [
        record
        for record in read_records(tmp_path / "asked.jsonl")
        if record.kind in ("which digit", "two pictures", "text only")
    ]
    accuracy = {
        score.kind: score.accuracy
        for score in scores(answer_records(*model, processor, records, SETTINGS))
    }
    assert accuracy["which digit"] >= 0.95
    assert accuracy["two pictures"] >= 0.9
    assert accuracy["text only"] >= 0.95


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transformers_gives_the_same_answers(model, processor):
    """One question at a time: in a batch, transformers lets samples see each other's pictures."""
    from transformers import AutoProcessor
    from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration

    records = read_records(EXAMPLE / "demo" / "questions.jsonl")
    ours = [a.text for a in answer_records(*model, processor, records, SETTINGS)]
    reference = MllamaForConditionalGeneration.from_pretrained(MODEL, attn_implementation="eager")
    reference_processor = AutoProcessor.from_pretrained(MODEL)
    for record, answer in zip(records, ours, strict=True):
        prompt = reference_processor.apply_chat_template(
            list(record.question), add_generation_prompt=True
        )
        images = [load_image(path) for path in record.images]
        inputs = reference_processor(
            images=images or None, text=prompt, add_special_tokens=False, return_tensors="pt"
        )
        with torch.no_grad():
            generated = reference.generate(**inputs)
        new = generated[0, inputs["input_ids"].shape[1] :]
        assert reference_processor.decode(new, skip_special_tokens=True).strip() == answer, record


def test_the_folder_is_complete_and_small():
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["MllamaForConditionalGeneration"]
    assert 2e6 < (MODEL / "model.safetensors").stat().st_size < 4e6
    assert "CC BY 4.0" in (EXAMPLE / "LICENSE-DATA.txt").read_text()
