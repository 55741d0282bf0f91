"""Cold processes: importing, and the first token of an answer about a picture.

    python benchmarks/start.py                 # five turns
    python benchmarks/start.py --quick
    python benchmarks/start.py --peer-python ENV/bin/python           # with current transformers

Each figure is of a new process, from its start to its end. Ours is measured with an empty cache of
compiled programs and with one that an earlier process filled; transformers compiles nothing.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import Report, Row, Spread, add_peer_python, arguments_of, parser
from models import CACHE, ROOT, model_folder

PICTURE = ROOT / "examples/digits/demo/pictures/digit_0501.png"
PROMPT = "<|image|><|begin_of_text|>What is in this picture?"
"""transformers lets tokens before the first picture attend to it: so there are none."""
THEIRS = """
import sys, torch
from PIL import Image
from transformers import MllamaForConditionalGeneration, MllamaProcessor
folder, picture, text = sys.argv[1:]
processor = MllamaProcessor.from_pretrained(folder)
model = MllamaForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32)
inputs = processor(Image.open(picture), text, add_special_tokens=False, return_tensors="pt")
with torch.inference_mode():
    output = model.generate(**inputs, max_new_tokens=1, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:]))
"""
VERSIONS = "from importlib.metadata import version as v; print('transformers', v('transformers'))"
IMPORTS = {
    "ours": "import mllama_jax; mllama_jax.MllamaForConditionalGeneration",
    "peer": "from transformers import MllamaForConditionalGeneration, MllamaProcessor",
}


def seconds(command: list[str], cores: int, **environment: str) -> tuple[float, str]:
    """Of a process from start to end, and what it printed."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(cores))
    environment = {**os.environ, **limits, "JAX_PLATFORMS": "cpu", **environment}
    started = time.perf_counter()
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, range(cores))), *command],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return time.perf_counter() - started, done.stdout.strip()


def ours(folder: Path, cores: int, compiled: Path) -> tuple[float, str]:
    command = [str(Path(sys.executable).with_name("mllama-jax")), "generate"]
    command += ["--model", str(folder), "--image", str(PICTURE), "--prompt", PROMPT, "--raw"]
    command += ["--max-new-tokens", "1", "--temperature", "0", "--no-stream"]
    return seconds(command, cores, JAX_COMPILATION_CACHE_DIR=str(compiled))


def peer(folder: Path, cores: int, python: str) -> tuple[float, str]:
    command = [python, "-c", THEIRS, str(folder), str(PICTURE), PROMPT]
    return seconds(command, cores)


def measure(folder: Path, cores: int, repeats: int, peer_python: str | None) -> Report:
    pythons = {"ours": sys.executable, "peer": peer_python or sys.executable}
    found: dict[str, list[float]] = {}

    def add(name: str, result: tuple[float, str]) -> str:
        found.setdefault(name, []).append(result[0])
        print(f"{name}: {result[0]:.2f} s", flush=True)
        return result[1]

    with tempfile.TemporaryDirectory() as compiled:
        ours(folder, cores, Path(compiled))  # fills it, and the machine's file cache
        peer(folder, cores, pythons["peer"])
        for _ in range(repeats):
            for side, code in IMPORTS.items():
                add(f"import, {side}", seconds([pythons[side], "-c", code], cores))
            warm = add("warm, ours", ours(folder, cores, Path(compiled)))
            theirs = add("peer", peer(folder, cores, pythons["peer"]))
            assert warm.endswith(theirs) or peer_python, (warm, theirs)
            empty = Path(compiled) / "empty"
            add("cold, ours", ours(folder, cores, empty))
            shutil.rmtree(empty, ignore_errors=True)
    report = Report("Cold start, against transformers", exact=not peer_python)
    for subject, side, other in (
        ("import", "import, ours", "import, peer"),
        ("first token, programs compiled before", "warm, ours", "peer"),
        ("first token, nothing compiled yet", "cold, ours", "peer"),
    ):
        report.rows.append(_faster(subject, found[side], found[other]))
    report.notes.append(f"the peer: {seconds([pythons['peer'], '-c', VERSIONS], cores)[1]}")
    if not warm.endswith(theirs):
        report.notes.append(f"first tokens differ: {warm!r} here, {theirs!r} there")
    report.notes.append("the ratio says how many times as fast ours is")
    return report


def _faster(subject: str, ours: list[float], peer: list[float]) -> Row:
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    aim = None if "yet" in subject else 1.0
    return Row(subject, "s", *map(Spread.of, (ours, peer, ratios)), aim=aim)


def main() -> None:
    options = parser(__doc__.splitlines()[0], "start")
    options.set_defaults(repeats=5)
    add_peer_python(options)
    options.add_argument("--cache", type=Path, default=CACHE)
    arguments = arguments_of(options)
    folder = model_folder(arguments.cache)
    repeats = 1 if arguments.quick else arguments.repeats
    report = measure(folder, arguments.cores, repeats, arguments.peer_python)
    report.write(arguments.output, arguments.cores)


if __name__ == "__main__":
    main()
