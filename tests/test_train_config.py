"""What a run can be told, and what it says about mistakes."""

import pytest
import yaml

from mllama_jax.train.config import ConfigError, DataConfig, ModelConfig, TrainConfig
from mllama_jax.train.config_file import differences, load_config, to_yaml

TEXT = """
output: runs/a
steps: 10
model: {path: start}
data: {train: train.jsonl, lengths: [16, 32]}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(TEXT)
    return path


def problem(file, *words) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(file, words)
    return str(error.value)


def test_words_replace_what_the_file_says(file):
    words = ("steps=20", "optimizer.learning_rate=2e-3", "data.lengths=[8,64]", "data.held_out=h")
    config = load_config(file, words)
    assert (config.steps, config.optimizer.learning_rate) == (20, 2e-3)
    assert tuple(config.data.lengths) == (8, 64)
    assert config.data.held_out == "h"
    assert config.model == ModelConfig(path="start")


def test_what_is_written_reads_back(file, tmp_path):
    config = load_config(file, ["evaluation.limit=7"])
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(copy) == config
    assert yaml.safe_load(copy.read_text())["evaluation"]["limit"] == 7


def test_unknown_keys_come_together_with_the_nearest_known(file):
    file.write_text(TEXT + "optimiser: {}\ncheckpoint: {evry: 3}\n")
    message = problem(file, "learning_rate=1", "data.batchsize=4")
    assert "'optimiser'; did you mean 'optimizer'?" in message
    assert "'checkpoint.evry'; did you mean 'checkpoint.every'?" in message
    assert "'learning_rate'; did you mean 'optimizer.learning_rate'?" in message
    assert "'data.batchsize'; did you mean 'data.batch_size'?" in message
    assert str(file) in message


def test_a_name_that_stands_in_several_sections_names_all_of_them(file):
    assert "'checkpoint.every' or 'evaluation.every'" in problem(file, "every=3")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("steps=many", "steps is 'many'; expected a whole number"),
        ("steps=1.5", "steps is 1.5; expected a whole number"),
        ("steps.x=1", "steps is {'x': 1}; expected a whole number"),
        ("data.lengths=[16,long]", "data.lengths is [16, 'long']; expected a list of whole"),
        ("data.held_out=[a]", "data.held_out is ['a']; expected text or null"),
        ("model.remat=maybe", "model.remat='maybe': expected none or dots or attention or full"),
        ("model.path=${nowhere}", "model.path: Interpolation key 'nowhere' not found"),
        ("model.dtype=float8", "expected float32 or bfloat16 or float16"),
        ("model.attention=flash", "expected reference or xla"),
        ("model=start", "expected a section with any of path"),
        ("steps", "expected key=value"),
        ("data.lengths=[", "not readable as YAML"),
        ("data.lengths=[32,16]", "expected rising positive lengths"),
        ("steps=0", "steps=0: expected a number above 0"),
        ("optimizer.warmup_steps=10", "expected fewer than steps=10"),
        ("optimizer.b2=1.0", "optimizer.b2=1.0"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan: expected a number above 0"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate=inf: expected a finite number"),
        ("seed=4294967296", "expected a number below 2**32"),
        ("evaluation.limit=0", "or null for all"),
        ("checkpoint.keep_every=0", "checkpoint.keep_every=0: expected a number above 0, or null"),
        ("data.held_out_format=csv", "data.held_out_format='csv': expected auto or messages"),
        ("lora.rank=8", "expected trained.preset=lora, or a component with mode lora"),
    ],
)
def test_bad_values_name_key_value_and_what_was_expected(file, word, expected):
    assert expected in problem(file, word)


def test_values_of_the_wrong_type_come_together(file):
    file.write_text(TEXT + "seed: x\ncheckpoint: {every: soon, keep: 3}\n")
    message = problem(file, "steps=many")
    assert f"{file}: seed is 'x'" in message
    assert f"{file}: checkpoint.every is 'soon'" in message
    assert "steps=many: steps is 'many'" in message
    assert "keep" not in message


def test_values_out_of_range_come_together():
    with pytest.raises(ConfigError) as error:
        TrainConfig("out", 0, -1, model=ModelConfig("m"), data=DataConfig("d", batch_size=0))
    message = str(error.value)
    assert all(key in message for key in ("steps=0", "seed=-1", "data.batch_size=0"))


def test_required_keys_are_named(file):
    file.write_text("steps: 3\nmodel: {}\n")
    assert "data.train, model.path, output" in problem(file)


@pytest.mark.parametrize("text", ["- a\n- b\n", "steps: [1\n"])
def test_files_that_hold_no_settings_are_named(file, text):
    file.write_text(text)
    assert str(file) in problem(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_differences_are_told_key_by_key(file):
    before = to_yaml(load_config(file))
    assert differences(before, load_config(file)) == []
    after = load_config(file, ["steps=11", "data.held_out=h"])
    assert differences(before, after) == ["data.held_out: None -> 'h'", "steps: 10 -> 11"]
