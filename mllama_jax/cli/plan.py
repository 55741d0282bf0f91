"""``mllama-jax plan``: does a job fit a slice, and how fast can it be at best?"""

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mllama_jax.cli.options import Attention, Dtype, Quantise

if TYPE_CHECKING:
    from mllama_jax.plan import Job

DOES_NOT_FIT = 3
"""The exit status where no plan fits; 1 and 2 are errors."""


def plan(
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE")
    ] = (),
    config: Path | None = None,
    model: str = "11b",
    task: Literal["train", "lora", "prefill", "decode", "vision"] = "train",
    topology: str = "v5e:4x4",
    compare: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TOPOLOGY ...")] = (),
    mesh: str | None = None,
    batch: int | None = None,
    length: int | None = None,
    images: int = 1,
    remat: Literal["none", "dots", "attention", "full"] | None = None,
    dtype: Dtype = "bfloat16",
    param_dtype: Dtype | None = None,
    attention: Attention | None = None,
    images_at_once: int | None = None,
    rank: int = 16,
    quantise: Quantise | None = None,
    search: bool = False,
    max_compiles: int = 8,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
    html: Path | None = None,
    cache: bool = True,
) -> None:
    """Say whether a job fits a slice of TPUs, and how fast it can be at best, without any TPU.

    The very function that the job would run is compiled for the devices that you name, with the
    TPU's own compiler (pip install 'mllama-jax[plan]'). Memory is what that compiler allots. Time
    is a lower bound: hardware takes longer, so rates and MFU (model-FLOPs utilisation) are upper
    bounds. Every figure says whether it was measured, counted or estimated.

    A full-size training step compiles for minutes, generation for less; results are kept, and the
    same question is answered at once the next time. The exit status is 0 if the job fits (of
    several, if one does), 3 if it does not, and 1 or 2 if it was not understood.

    For example:
      $ mllama-jax plan --topology v5e:4x4
      $ mllama-jax plan --task lora --topology v5e:2x2 --batch 8
      $ mllama-jax plan --model 90b --task decode --topology v6e:2x4 --batch 8
      $ mllama-jax plan --task lora --topology v5e:2x4 --search
      $ mllama-jax plan --task decode --compare v5e:2x4 v6e:2x4 v5p:2x2x1 --html decode.html
      $ mllama-jax plan --topology 'v5e:16x16*2' --mesh data=2,fsdp=256 --json
      $ mllama-jax plan --config recipes/11b_lora_v5e-16.yaml --topology v5e:4x4 model.remat=full

    Args:
        overrides: with --config, settings that replace the file's, such as data.batch_size=32.
        config: YAML file of a training run, which then decides all but topology and images: its
            own step is planned, on a batch of its longest rows.
        model: 11b or 90b (the released shapes, 560 pixels a tile), or a folder with a config.json.
        task: "train" is full fine-tuning with AdamW, "lora" trains adapters of the decoder,
            "prefill" reads prompts, "decode" adds a token to each row, "vision" encodes pictures.
        topology: generation and shape of the slice: v5e:4x4 has 16 chips of TPU v5e; v5e:4x4*2 is
            two such slices; h100:8 is a host of GPUs. An unknown one is answered with a list.
        compare: several topologies, side by side, in place of --topology.
        mesh: how the chips are divided, such as data=2,fsdp=8 or tensor=8; -1 stands for all that
            are left. By default fsdp over all chips of a slice for training; for prefill and decode
            tensor over 8 chips, or more if the parameters need it, and data over the rest.
        batch: samples of one step on all chips together (for vision, pictures). By default one a
            chip, for decode 16 rows for each group of chips that holds the model.
        length: text tokens a sample; for decode, slots of the cache. By default 2048 and 4096.
        images: of each sample, of as many tiles as the model takes; 0 for text alone.
        remat: what training computes twice to save memory: "full" keeps only each layer's input.
            By default full.
        dtype: of the computation.
        param_dtype: of the parameters; by default float32 for train and bfloat16 otherwise.
        attention: how attention is computed; by default the fused kernels: splash on TPUs, cudnn on
            GPUs.
        images_at_once: pictures that a chip encodes at a time in training; all of its own by
            default.
        rank: of LoRA's adapters.
        quantise: weights of the decoder's layers in 8 or 4 bits; for prefill and decode.
        search: find the largest batch and the cheapest remat that fit, unless they are given.
        max_compiles: --search stops after so many compilations on a topology.
        as_json: print the plans as JSON, one a line, instead of a report.
        html: also write a page with a picture of the memory.
        cache: keep plans in ~/.cache/mllama_jax and use those that are there.
    """
    from mllama_jax.plan import Job
    from mllama_jax.plan import plan as make_plan
    from mllama_jax.plan import search as look
    from mllama_jax.plan.html import page
    from mllama_jax.plan.record import to_text
    from mllama_jax.plan.report import comparison, report, trials
    from mllama_jax.plan.store import default_folder
    from mllama_jax.plan.topology import prepare_environment

    prepare_environment()
    asked = Job(
        model=model,
        task=task,
        mesh=mesh,
        batch=batch,
        length=length,
        images=images,
        remat=remat,
        dtype=dtype,
        param_dtype=param_dtype,
        attention=attention,
        images_at_once=images_at_once,
        rank=rank,
        quantise=quantise,
    )
    if config is not None:
        asked = _of_config(config, overrides, asked, search)
    elif overrides:
        raise ValueError(f"{' '.join(overrides)}: settings are for --config")
    jobs = [replace(asked, topology=name) for name in compare or (topology,)]
    folder = default_folder() if cache else None
    plans = []
    for job in jobs:
        if not search:
            plans.append(make_plan(job, folder=folder, quiet=False))
            continue
        found = look(job, max_compiles=max_compiles, folder=folder, quiet=False)
        print(trials(found), file=sys.stderr if as_json else sys.stdout)
        plans.append(found.best or found.trials[-1])
    if as_json:
        print(to_text(plans), end="")
    else:
        print(comparison(plans) if len(plans) > 1 else report(plans[0]))
    if html is not None:
        html.write_text(page(plans))
        print(f"wrote {html}", file=sys.stderr)
    if not any(found.fits for found in plans):
        sys.exit(DOES_NOT_FIT)


def _of_config(file: Path, overrides: tuple[str, ...], asked: "Job", search: bool) -> "Job":
    """The job of a run's configuration; it leaves nothing but the pictures to options."""
    from mllama_jax.plan.job import Job
    from mllama_jax.plan.recipes import job_of
    from mllama_jax.train.config_file import load_config

    given = [
        f"--{item.name.replace('_', '-')}"
        for item in fields(Job)
        if item.name != "images" and getattr(asked, item.name) != item.default
    ]
    if search:
        given.append("--search")
    if given:
        raise ValueError(
            f"{', '.join(given)}: the file of --config decides this; change a setting with "
            "KEY=VALUE"
        )
    return job_of(load_config(file, overrides), asked.topology, asked.images)
