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
    checkpoint.

    Args:
        config: YAML file; --print-config shows every setting that it may hold.
        overrides: settings that replace the file's, such as optimizer.learning_rate=2e-3.
        print_config: only print the whole configuration, defaults included, as YAML.
        distributed: this is one of several processes, on a host each, that were all started with
            the same command; the first one prints. The configuration's mesh is of their devices.
    """
    from mllama_jax.train.config import load_config, to_yaml

    settings = load_config(config, overrides)
    if print_config:
        print(to_yaml(settings), end="")
        return
    if distributed:
        from mllama_jax.distributed import join_processes

        join_processes()
    from mllama_jax.train.loop import train as run

    try:
        run(settings)
    except FloatingPointError as error:  # the message says all; main() knows only bad input
        sys.exit(f"mllama-jax: {error}")
