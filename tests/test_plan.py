"""`mllama-jax plan` from end to end: programs compiled for TPUs that are not there."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

import mllama_jax as mj
from mllama_jax.plan.record import GIB, from_text, to_text

# Two units of a decoder whose heads divide over eight chips.
CONFIG = mj.MllamaConfig(
    vision_config={
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "num_attention_heads": 8,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 256,
        "image_size": 56,
    },
    text_config={
        "vocab_size": 512,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    image_token_index=512,
)


# Adapters beside 8-bit weights, a projector trained whole, packed rows.
RUN = """
output: {folder}/out
steps: 100
mesh: fsdp=4
model: {{path: {folder}, dtype: bfloat16, param_dtype: bfloat16, quantise: int8, attention: splash}}
trained: {{preset: lora, projector: {{mode: full}}}}
lora: {{rank: 4}}
data: {{train: none.jsonl, lengths: [128, 256], packing: true, max_images: 2}}
optimizer: {{microbatches: 1, moment_dtype: bfloat16}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_blocks")
    CONFIG.save_pretrained(folder)
    (folder / "run.yaml").write_text(RUN.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """What the commands of planner_runs.py ended with, printed and said."""
    script = Path(__file__).with_name("planner_runs.py")
    # The command itself has to see to it that no device is looked for.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, script, folder],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compared(runs):
    return from_text(runs["compared"]["printed"])


def test_a_plan_is_a_table_with_a_verdict(runs):
    run = runs["decode"]
    assert run["status"] == 0
    lines = run["printed"].splitlines()
    assert "decode on v5e:2x4 (8 chips, TPU v5e): fits" in lines[0]
    assert "16 rows of 512 cached tokens and 1 image" in lines[1]
    assert "tensor=8" in lines[2]
    for kind in ("cache", "parameters", "temporaries", "code", "usable"):
        assert any(line.split()[:1] == [kind] for line in lines), kind
    assert "measured: " in run["printed"]
    assert "counted: " in run["printed"]
    assert "compiling" in run["said"]


def test_memory_is_what_arguments_and_compiler_say(compared):
    text = CONFIG.text_config
    for plan in compared:
        amounts = {amount.kind: amount for amount in plan.memory.amounts}
        assert amounts["cache"].source == "shapes"
        # Two self- and two cross-attention layers, two of eight heads on each of four chips; an
        # image's tokens are padded by a few.
        a_slot = 2 * 2 * 16 * (text.num_key_value_heads // 4) * text.head_dim * 2
        slots, rest = divmod(amounts["cache"].bytes, a_slot)
        assert rest == 4  # the length
        assert 512 + 4 * 17 <= slots < 512 + 4 * 17 + 16
        assert amounts["code"].source == "compiler"
        assert plan.memory.needed == sum(amount.bytes for amount in amounts.values())
    usable = [plan.memory.usable / GIB for plan in compared]
    assert usable == pytest.approx([15.75, 31.24], abs=0.01)


def test_bounds_follow_from_the_terms(compared):
    for plan in compared:
        bound = plan.bound
        assert bound is not None
        assert max(term.seconds for term in bound.terms) <= bound.seconds
        assert 0 < bound.mfu < 1
        rates = {rate.unit: rate.value for rate in plan.rates}
        assert rates["tokens/s"] == pytest.approx(16 / bound.seconds)
        assert rates["ms a token"] == pytest.approx(1e3 * bound.seconds)


def test_plans_are_json_and_come_back(compared):
    assert [plan.job.topology for plan in compared] == ["v5e:2x2", "v6e:2x2"]
    assert from_text(to_text(compared)) == compared
    values = json.loads(to_text(compared).splitlines()[0])
    assert values["fits"] is True
    with pytest.raises(ValueError, match="not a plan that this version wrote"):
        type(compared[0]).from_json({**values, "colour": "blue"})


def test_the_page_draws_what_the_plans_say(compared, folder):
    page = (folder / "page.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")  # it needs nothing else
    drawing = page[page.index("<svg") : page.index("</svg>") + len("</svg>")]
    tree = xml.etree.ElementTree.fromstring(drawing)
    bars = list(tree.iter("rect"))
    assert len(bars) == sum(len(plan.memory.amounts) for plan in compared)
    assert len(list(tree.iter("line"))) == len(compared)
    # One scale for all plans: widths are as the bytes.
    left = float(bars[0].get("x", 0))
    limits = [float(line.get("x1", 0)) - left for line in tree.iter("line")]
    scale = limits[0] / compared[0].memory.usable
    assert limits[1] == pytest.approx(scale * compared[1].memory.usable, abs=0.1)
    widths = sum(float(bar.get("width", 0)) for bar in bars)
    needed = sum(plan.memory.needed for plan in compared)
    assert widths == pytest.approx(scale * needed, abs=0.05 * len(bars))


def test_out_of_memory_names_the_largest_arrays_and_what_helps(runs):
    run = runs["refused by the compiler"]
    assert run["status"] == 3
    assert "does not fit: needs" in run["printed"]
    largest = run["printed"].split("Largest arrays")[1].splitlines()[1]
    assert largest.split("  ")[1] == "attention scores of a layer of the decoder"
    assert "--attention splash" in run["printed"]


def test_what_is_too_large_at_once_is_not_compiled(runs):
    run = runs["refused at once"]
    assert run["status"] == 3
    assert "at least" in run["printed"]
    assert "Not compiled" in run["printed"]
    assert "compiling" not in run["said"]
    assert "cache: keys" in run["printed"].split("Largest arrays")[1].splitlines()[1]
    helps = run["printed"].split("What would help")[1]
    assert "--batch" in helps.splitlines()[1]


def test_weights_that_are_too_large_are_advised_to_be_quantised(runs):
    run = runs["answers of 90b refused at once"]
    assert run["status"] == 3
    helps = run["printed"].split("What would help")[1]
    assert "--quantise int8: 8 bits" in helps.splitlines()[1]
    assert "--quantise nf4: 4.5 bits" in helps.splitlines()[2]


def test_full_training_of_11b_on_one_chip(runs):
    run = runs["training refused at once"]
    assert run["status"] == 3
    table = run["printed"].split("Memory, GiB a chip\n")[1].split("\n\n")[0]
    amounts = {line[:20].strip(): float(line[20:].split()[0]) for line in table.splitlines()}
    # 10.67 billion parameters of four bytes, and AdamW's two moments of each.
    assert amounts["parameters"] == pytest.approx(10.67e9 * 4 / GIB, rel=1e-3)
    assert amounts["optimizer state"] == pytest.approx(2 * amounts["parameters"], abs=0.02)
    helps = run["printed"].split("What would help")[1].split("\n\n")[0]
    assert "--task lora" in helps
    assert "more chips: about 16 " in helps


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no such topology", ["v5e:3x5", "v5e:4x4", "v5e:16x16"]),
        ("another mesh", ["fsdp=7", "8"]),
        ("batch between groups", ["batch=12", "fsdp=8", "a multiple of 8"]),
        ("no such model", ["nothing", "11b, 90b", "config.json"]),
        ("no such kernel", ["prefill", "v5e:1x1", "float16", "splash", "Invalid vector type"]),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(runs, name, said):
    status = runs[name]["status"]
    assert isinstance(status, str)  # sys.exit(text): status 1, the text on standard error
    for words in said:
        assert words in status


def test_a_run_s_own_step_is_planned(runs, folder):
    [found] = from_text(runs["a run"]["printed"])
    assert found.fits
    assert (found.job.batch, found.job.length, found.job.images) == (4, 256, 2)
    assert "batch_size: 4" in found.job.config
    sizes = {amount.kind: amount.bytes for amount in found.memory.amounts}
    vision, text = CONFIG.vision_config, CONFIG.text_config
    projector = vision.vision_output_dim * text.hidden_size + text.hidden_size
    assert sizes["parameters"] == pytest.approx(projector * 2 / 4, rel=0.01)
    # Eight bits a weight of the layers, sixteen of embedding and head, which is half of a layer.
    head = text.hidden_size // text.num_attention_heads
    layer = (4 * text.hidden_size * head * text.num_attention_heads) + (
        3 * text.hidden_size * text.intermediate_size
    )
    eight_bits = text.num_hidden_layers * layer / 4
    assert eight_bits < sizes["frozen parameters"] < 1.5 * eight_bits
    # One moment is bfloat16 as the projector is, the other float32 as adapters are.
    expected = 1.5 * sizes["adapters"] + 3 * sizes["parameters"]
    assert sizes["optimizer state"] == pytest.approx(expected, rel=1e-3)
    assert 0 < found.bound.mfu < 1


def test_a_run_that_does_not_fit_is_told_which_settings_to_change(runs):
    run = runs["a run that does not fit"]
    assert run["status"] == 3
    assert "data.batch_size=" in run["printed"]
    assert "--batch" not in run["printed"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a run and options", "--batch, --search: the file of --config decides this"),
        ("a run with a mistake", "did you mean 'data.batch_size'"),
        ("settings of no run", "data.batch_size=4: settings are for --config"),
    ],
)
def test_what_a_run_leaves_to_options(runs, name, said):
    assert said in str(runs[name]["status"])
