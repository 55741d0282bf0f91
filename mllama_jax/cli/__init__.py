"""The command line: ``mllama-jax COMMAND``; each file here is one command."""

import sys

import tyro


def main() -> None:
    """Runs the command that ``sys.argv`` names."""
    from mllama_jax.cli.batch import batch
    from mllama_jax.cli.convert import convert
    from mllama_jax.cli.demo import demo
    from mllama_jax.cli.eval import eval
    from mllama_jax.cli.generate import generate
    from mllama_jax.cli.inspect import inspect
    from mllama_jax.cli.plan import plan
    from mllama_jax.cli.train import train
    from mllama_jax.cli.verify import verify

    app = tyro.extras.SubcommandApp()
    for command in (convert, inspect, verify, generate, batch, eval, train, plan, demo):
        chosen = command.__name__ in sys.argv[1:2]
        summary = (command.__doc__ or "").splitlines()[0]
        # A line each in the list of commands, everything where a command is asked for its help.
        app.command(help=None if chosen else summary)(command)
    try:
        app.cli(
            prog="mllama-jax",
            description="Llama 3.2 Vision in JAX and Flax.",
            sort_subcommands=False,
        )
    except (OSError, ValueError, FloatingPointError, ImportError) as error:
        # What the user gave is wrong, and the message says what: a traceback would hide it.
        sys.exit(f"mllama-jax: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
