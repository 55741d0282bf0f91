"""``python -m mllama_jax``: the command line."""

from mllama_jax.cli import main

if __name__ == "__main__":
    main()
