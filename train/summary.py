"""A finished run at a glance: its curves as a picture, and a page with them and the settings."""

import base64
import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mllama_jax.batch.report_page import safe
from mllama_jax.train.metrics import replace_bytes, replace_text

_SMOOTHED = 100
"""Points of a smoothed curve: each is the mean of as many steps as give so many."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 0 auto; padding: 1rem;
  color: #1d2733; }
img { max-width: 100%; }
pre { background: #f4f6f8; padding: .7rem; overflow-x: auto; }
th, td { padding: .1rem 1.5rem .1rem 0; text-align: right; }
th:first-child, td:first-child { text-align: left; }
"""

Line = Mapping[str, float | int]


def write_summary(folder: epath.Path, what: str, settings: str) -> str:
    """Writes summary.png and summary.html of a run's metrics.jsonl and speed.jsonl.

    Args:
        folder: of the run.
        what: is trained, as text.
        settings: of the run, as YAML.

    Returns:
        What there is now, or why there is nothing, in a line.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "No summary was drawn: that needs pip install 'mllama-jax[watch]'."
    lines = _read(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    scores = [line for line in lines if "loss" not in line]
    speeds = _read(folder / "speed.jsonl")
    picture = _drawn(steps, scores, speeds)
    replace_bytes(folder / "summary.png", picture)
    title = f"{folder.name}: {len(steps):,} steps"
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{safe(title)}</title><style>{_STYLE}</style></head>
<body>
<h1>{safe(title)}</h1>
{_table(steps, scores, speeds)}
<img src="{url}" alt="Curves of the loss, learning rate, gradient norm, held-out scores and speed">
<h2>What was trained</h2>
<pre>{safe(what)}</pre>
<h2>Settings</h2>
<pre>{safe(settings)}</pre>
</body>
</html>
"""
    replace_text(folder / "summary.html", page)
    return f"The run at a glance: {folder / 'summary.html'}"


def _read(file: epath.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _table(steps: Sequence[Line], scores: Sequence[Line], speeds: Sequence[Line]) -> str:
    """The last numbers of each kind."""
    recent = [line["loss"] for line in steps[-max(len(steps) // 100, 1) :]]
    rows = {"loss, mean of the last hundredth of the steps": f"{np.mean(recent):.4f}"}
    rows["steps that were skipped"] = f"{sum(line['skipped'] for line in steps):.0f}"
    if scores:
        rows |= {
            f"{name}, after step {scores[-1]['step']:,}": f"{value:.4f}"
            for name, value in scores[-1].items()
            if name != "step"
        }
    if speeds:
        seconds = sum(line["seconds"] for line in speeds)
        rows["seconds in steps, compiling included"] = f"{seconds:,.0f}"
        for name in ("tokens_per_second", "images_per_second", "wait_share", "mfu"):
            if name in speeds[-1]:
                rows[f"{name}, median"] = f"{np.median([line[name] for line in speeds]):.4g}"
    cells = "".join(
        f"<tr><td>{safe(name)}</td><td>{safe(value)}</td></tr>\n" for name, value in rows.items()
    )
    return f"<table>\n{cells}</table>\n"


def _drawn(steps: Sequence[Line], scores: Sequence[Line], speeds: Sequence[Line]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    (loss, accuracy), (norm, rate), (speed, waiting) = figure.subplots(3, 2)
    _draw(loss, steps, "loss", smooth=True)
    _draw(loss, scores, "eval_loss", marker="o")
    for name in dict.fromkeys(name for line in scores for name in line):
        if name.startswith("accuracy/"):
            _draw(accuracy, scores, name, marker="o")
    accuracy.set_title("held-out answers that are right")
    _draw(norm, steps, "grad_norm", smooth=True)
    norm.set_yscale("log")
    _draw(rate, steps, "learning_rate")
    _draw(speed, speeds, "tokens_per_second")
    _draw(waiting, speeds, "wait_share")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.set_xlabel("step")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw(
    axes: Any, lines: Sequence[Line], name: str, *, smooth: bool = False, marker: str = ""
) -> None:
    points = [(line["step"], line[name]) for line in lines if name in line]
    if not points:
        return
    x, y = np.array(points, float).T
    [curve] = axes.plot(x, y, label=name, marker=marker, alpha=0.35 if smooth else 1.0)
    size = len(y) // _SMOOTHED
    if smooth and size > 1:
        whole = len(y) // size * size
        means = (values[:whole].reshape(-1, size).mean(1) for values in (x, y))
        axes.plot(*means, color=curve.get_color())
