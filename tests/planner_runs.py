"""Plans of a two-block model in a process of its own, as the command line makes them.

It takes a folder with a config.json, and prints a JSON object: name of the run → its exit status,
what it printed, and what it said.
"""

import contextlib
import io
import json
import sys

from mllama_jax.cli import main

FOLDER = sys.argv[1]
TINY = ("--model", FOLDER, "--no-cache")
RUN = ("--no-cache", "--config", f"{FOLDER}/run.yaml")
RUNS = {
    "decode": (*TINY, "--task", "decode", "--length", "512", "--topology", "v5e:2x4"),
    "compared": (
        *(*TINY, "--task", "decode", "--batch", "16", "--length", "512", "--json"),
        *("--compare", "v5e:2x2", "v6e:2x2", "--html", f"{FOLDER}/page.html"),
    ),
    "refused by the compiler": (
        *(*TINY, "--task", "prefill", "--topology", "v5e:1x1", "--images", "0"),
        *("--attention", "reference", "--length", "32768"),
    ),
    "no such kernel": (
        *(*TINY, "--task", "prefill", "--topology", "v5e:1x1"),
        *("--dtype", "float16"),
    ),
    "refused at once": (*TINY, "--task", "decode", "--topology", "v5e:1x1", "--batch", "8192"),
    "answers of 90b refused at once": (
        *("--no-cache", "--model", "90b", "--task", "decode", "--topology", "v5e:2x4"),
    ),
    "training refused at once": ("--no-cache", "--topology", "v5e:1x1"),
    "no such topology": (*TINY, "--topology", "v5e:3x5"),
    "another mesh": (*TINY, "--topology", "v5e:2x4", "--mesh", "fsdp=7"),
    "batch between groups": (*TINY, "--topology", "v5e:2x4", "--batch", "12"),
    "parameters between devices": (
        *(*TINY, "--topology", "v5e:4x4", "--task", "decode", "--mesh", "tensor=1,fsdp=16"),
        *("--batch", "16"),
    ),
    "no such model": ("--model", f"{FOLDER}/nothing"),
    "a run": (*RUN, "--topology", "v5e:2x2", "data.batch_size=4", "--json"),
    "a run that does not fit": (*RUN, "--topology", "v5e:2x2", "data.batch_size=67108864"),
    "a run and options": (*RUN, "--batch", "8", "--search"),
    "a run with a mistake": (*RUN, "--topology", "v5e:2x2", "data.batchsize=4"),
    "settings of no run": (*TINY, "data.batch_size=4"),
}


def run(arguments: tuple[str, ...]) -> dict[str, object]:
    sys.argv = ["mllama-jax", "plan", *arguments]
    status: object = 0
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        try:
            main()
        except SystemExit as end:
            status = end.code
    return {"status": status, "printed": printed.getvalue(), "said": said.getvalue()}


if __name__ == "__main__":
    print(json.dumps({name: run(arguments) for name, arguments in RUNS.items()}))
