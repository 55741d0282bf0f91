"""What stands for the options that nobody gave, and which jobs are refused."""

import jax
import pytest

from mllama_jax.plan.job import Job, resolved
from mllama_jax.plan.models import RELEASED, find_config, num_parameters
from mllama_jax.plan.programs import build_program, bytes_a_device
from mllama_jax.plan.topology import parse_topology


def settled(**fields):
    job = Job(**fields)
    return resolved(job, find_config(job.model), parse_topology(job.topology))[0]


@pytest.mark.parametrize(
    ("model", "task", "topology", "mesh", "batch"),
    [
        ("11b", "train", "v5e:4x4", "fsdp=16", 16),
        ("11b", "lora", "v5e:4x4*2", "data=2,fsdp=16", 32),
        ("11b", "decode", "v5e:2x2", "tensor=4", 16),
        ("11b", "decode", "v5e:4x4", "data=2,tensor=8", 32),
        ("90b", "decode", "v6e:2x4", "tensor=8", 16),
        ("90b", "decode", "v5e:8x8", "data=4,tensor=16", 64),  # 8 chips can't hold it
        ("11b", "prefill", "v5e:4x4", "data=2,tensor=8", 2),
        ("11b", "vision", "v5e:2x4", "data=8", 8),
    ],
)
def test_default_mesh_and_batch(model, task, topology, mesh, batch):
    job = settled(model=model, task=task, topology=topology)
    assert (job.mesh, job.batch) == (mesh, batch)


def test_defaults_of_the_tasks():
    train = settled(task="train")
    assert (train.length, train.remat, train.param_dtype) == (2048, "full", "float32")
    decode = settled(task="decode", length=3000, images=5)
    assert (decode.length, decode.remat, decode.param_dtype) == (3072, "none", "bfloat16")
    assert decode.images == 6  # generation compiles for some lengths and numbers of images only
    assert {train.attention, decode.attention} == {"splash"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch": 12, "topology": "v5e:2x4"}, r"batch=12 .* a multiple of 8"),
        ({"mesh": "fsdp=7", "topology": "v5e:2x4"}, "fsdp=7.*8"),
        ({"model": "70b"}, "'70b' is neither one of 11b, 90b nor a folder"),
        ({"topology": "v5e:3x3"}, "v5e:4x4"),
        ({"task": "sleep"}, "task='sleep': expected one of train, lora"),
        ({"remat": "some"}, "remat='some': expected one of none, dots"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"batch": 0}, "batch=0: expected at least 1"),
        ({"task": "vision", "images": 2}, "one picture a sample"),
    ],
)
def test_refused_jobs(fields, said):
    with pytest.raises(ValueError, match=said):
        settled(**fields)


def test_parameters_that_the_mesh_does_not_divide_are_named():
    config = RELEASED["11b"]
    job = Job(task="vision", topology="v5e:16x16", mesh="tensor=256", attention="xla")
    job, mesh = resolved(job, config, parse_topology("v5e:16x16"))
    with pytest.raises(ValueError, match=r"(?s)heads of size 32 is not divisible.*q_proj/kernel"):
        build_program(job, config, mesh)


def test_arguments_are_split_as_the_job_runs():
    config = RELEASED["11b"]
    job = Job(task="train", topology="v5e:2x4", attention="xla", batch=16, images=2)
    job, mesh = resolved(job, config, parse_topology("v5e:2x4"))
    program = build_program(job, config, mesh)
    # Norms, gates and biases are whole on every device.
    parameters = bytes_a_device(program.kinds["parameters"])
    assert parameters == pytest.approx(num_parameters(config) * 4 / 8, rel=1e-3)
    moments = bytes_a_device(program.kinds["optimizer state"])
    assert moments == pytest.approx(2 * parameters, rel=1e-6)
    text, pictures = 2 * 2048, 2 * 2
    numbers = 3 * text + text * 2 * 4 + pictures * (4 * 3 * 560 * 560 + 1 + 4)
    assert bytes_a_device(program.kinds["inputs"]) == 4 * numbers
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(program.kinds))


def test_a_chip_that_only_encodes_holds_no_decoder():
    config = RELEASED["11b"]
    job = Job(task="vision", topology="v5e:2x2", attention="xla")
    job, mesh = resolved(job, config, parse_topology("v5e:2x2"))
    program = build_program(job, config, mesh)
    assert bytes_a_device(program.kinds["parameters"]) == pytest.approx(0.895e9 * 2, rel=0.01)
    assert not program.held
