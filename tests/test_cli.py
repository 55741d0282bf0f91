"""The commands, as a user types them, with the example model."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mllama_jax.cli import main

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs ``mllama-jax`` in this process; returns what it printed."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["mllama-jax", *map(str, words)])
        main()
        return capsys.readouterr().out

    return run


def failure(run, *words: object) -> str:
    """The message with which a command ends."""
    with pytest.raises(SystemExit) as error:
        run(*words)
    return str(error.value)


def test_demo_answers_and_draws(tmp_path):
    """In a process of its own, with programs compiled as for users."""
    command = [sys.executable, "-m", "mllama_jax", "demo", "--output", str(tmp_path)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "answers are right" in printed
    asked = len((EXAMPLE / "demo" / "questions.jsonl").read_text().splitlines())
    right = int(printed.split(" of ")[0].split()[-1])
    assert right >= 0.9 * asked
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        colours = {colour for _, colour in sheet.getcolors(2**20)}
        assert sheet.width > 1000
    assert (26, 127, 55) in colours  # a right answer


def test_generate_streams_what_it_would_print_at_the_end(run):
    pictures = sorted((EXAMPLE / "demo" / "pictures").glob("*.png"))[:2]
    words = ["generate", "--model", EXAMPLE / "model", "--prompt", "What are the two numbers?"]
    for picture in pictures:
        words += ["--image", picture]
    streamed = run(*words)
    assert streamed == run(*words, "--no-stream")
    assert streamed.strip()[0].isdigit()


def test_generate_reads_raw_prompts(run):
    words = ("generate", "--model", EXAMPLE / "model", "--raw", "--max-new-tokens", 3)
    prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n3 plus 4 is"
    assert run(*words, "--prompt", prompt).strip()
    assert "--system" in failure(run, *words, "--prompt", prompt, "--system", "Be brief.")


def test_mistakes_end_in_one_line(run, tmp_path):
    model = ("generate", "--model", EXAMPLE / "model", "--prompt", "Hi")
    assert "no such file" in failure(run, *model, "--image", tmp_path / "absent.png")
    assert "There is no folder" in failure(
        run, "generate", "--model", tmp_path / "x", "--prompt", ""
    )
    assert "top_p" in failure(run, *model, "--temperature", 1, "--top-p", 3)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"messages": []}\n')
    assert "line 1" in failure(run, "demo", "--questions", questions)
    questions.write_text("\n")
    assert "no questions" in failure(run, "demo", "--questions", questions)
