"""``mllama-jax train``: a training run described by a YAML file."""

import sys
from pathlib import Path
from typing import Annotated

import tyro


def train(
    config: tyro.conf.Positional[Path],
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE")
    ] = (),
    print_config: bool = False,
    distributed: bool = False,
) -> None:
    """Train a model on conversations with pictures.

    Started again with the same arguments, a run that was stopped goes on from its newest
    checkpoint. SIGTERM and SIGINT stop it after the step that it is at, with a checkpoint of it;
    the exit status is then 143 or 130.

    Args:
        config: YAML file; --print-config shows every setting that it may hold.
        overrides: settings that replace the file's, such as optimizer.learning_rate=2e-3.
        print_config: only print the whole configuration, defaults included, as YAML.
        distributed: this must be one of several processes, on a host each, that were all started
            with the same command; the first one prints, and the configuration's mesh is of their
            devices. Without the option, that is found out on Cloud TPUs, under Slurm and Open MPI,
            and where JAX_NUM_PROCESSES is set.
    """
    from mllama_jax.train.config_file import load_config, to_yaml

    settings = load_config(config, overrides)
    if print_config:
        print(to_yaml(settings), end="")
        return
    from mllama_jax.distributed import join_if_any

    join_if_any(distributed)
    from mllama_jax.train.loop import train as run
    from mllama_jax.train.stopping import Stopped

    try:
        run(settings)
    except FloatingPointError as error:  # the message says all; main() knows only bad input
        sys.exit(f"mllama-jax: {error}")
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there", flush=True)
        sys.exit(128 + stopped.signal)
