"""The command line: ``mllama-jax COMMAND``; each file here is one command."""

import sys

import tyro


def main() -> None:
    """Runs the command that ``sys.argv`` names."""
    from mllama_jax.cli.demo import demo
    from mllama_jax.cli.generate import generate
    from mllama_jax.cli.train import train

    app = tyro.extras.SubcommandApp()
    app.command(demo)
    app.command(generate)
    app.command(train)
    try:
        app.cli(
            prog="mllama-jax",
            description="Llama 3.2 Vision in JAX and Flax.",
            sort_subcommands=False,
        )
    except (OSError, ValueError, FloatingPointError) as error:
        # What the user gave is wrong, and the message says what: a traceback would hide it.
        sys.exit(f"mllama-jax: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
