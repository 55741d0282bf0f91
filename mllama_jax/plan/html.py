"""Plans as one web page that needs nothing else: bars of memory against the limit, and tables."""

from collections.abc import Sequence
from html import escape

from mllama_jax.plan.record import GIB, Plan
from mllama_jax.plan.report import report, verdict, workload

_COLOURS = {
    "parameters": "#3b6fb6",
    "optimizer state": "#7a5195",
    "cache": "#2a9d8f",
    "temporaries": "#e9a23b",
    "temporaries and results": "#e9a23b",
    "inputs": "#9aa5b1",
    "results": "#c08497",
    "code": "#5c677d",
}
_OTHER_COLOUR = "#bcb8b1"
_BAR, _GAP, _LEFT, _WIDTH, _TOP = 30, 34, 190, 640, 24

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; padding: 0 1rem;
  color: #1d2733; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.fits { color: #1b7f4b; } .too-large { color: #b3261e; }
pre { background: #f4f6f8; padding: 1rem; overflow-x: auto; font-size: 12.5px; line-height: 1.4; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: #1d2733; }
.legend span { display: inline-block; margin-right: 1.2em; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; }
"""


def page(plans: Sequence[Plan]) -> str:
    """A whole HTML document."""
    models = ", ".join(dict.fromkeys(f"{plan.job.model} {plan.job.task}" for plan in plans))
    sections = [_section(plan) for plan in plans]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Plan: {escape(models)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Plan: {escape(models)}</h1>
<h2>Memory of each chip, GiB, and the limit</h2>
{_legend(plans)}
{_bars(plans)}
{"".join(sections)}
</body>
</html>
"""


def _section(plan: Plan) -> str:
    state = "fits" if plan.fits else "too-large"
    return (
        f"<h2>{escape(plan.job.topology)}: "
        f'<span class="{state}">{escape(verdict(plan))}</span></h2>\n'
        f"<p>{escape(workload(plan.job))}; {escape(plan.mesh)}</p>\n"
        f"<pre>{escape(report(plan))}</pre>\n"
    )


def _legend(plans: Sequence[Plan]) -> str:
    kinds = dict.fromkeys(amount.kind for plan in plans for amount in plan.memory.amounts)
    items = (f'<span><i style="background:{_colour(k)}"></i>{escape(k)}</span>' for k in kinds)
    return f'<p class="legend">{"".join(items)}</p>'


def _bars(plans: Sequence[Plan]) -> str:
    """One bar a plan, all on one scale, with a line where the usable memory ends."""
    most = max(max(plan.memory.needed, plan.memory.usable) for plan in plans) * 1.05
    scale = _WIDTH / most
    parts = [_bar(plan, _TOP + i * (_BAR + _GAP), scale) for i, plan in enumerate(plans)]
    height = _TOP + len(plans) * (_BAR + _GAP)
    return (
        f'<svg viewBox="0 0 {_LEFT + _WIDTH + 20} {height}" role="img" '
        f'aria-label="memory of each chip against the limit">\n{"".join(parts)}</svg>'
    )


def _bar(plan: Plan, y: float, scale: float) -> str:
    label = f"{plan.job.topology} · {plan.job.task}"
    parts = [f'<text x="0" y="{y + _BAR * 0.65:.0f}">{escape(label)}</text>\n']
    x = float(_LEFT)
    for amount in sorted(plan.memory.amounts, key=lambda amount: -amount.bytes):
        width = amount.bytes * scale
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.0f}" width="{width:.1f}" height="{_BAR}" '
            f'fill="{_colour(amount.kind)}"><title>{escape(amount.kind)}: '
            f"{amount.bytes / GIB:.2f} GiB</title></rect>\n"
        )
        x += width
    limit = _LEFT + plan.memory.usable * scale
    parts.append(
        f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{y - 6:.0f}" y2="{y + _BAR + 6:.0f}" '
        'stroke="#b3261e" stroke-width="2"/>\n'
        f'<text x="{limit:.1f}" y="{y - 9:.0f}" text-anchor="end">'
        f"limit {plan.memory.usable / GIB:.2f}</text>\n"
        f'<text x="{_LEFT}" y="{y + _BAR + 15:.0f}">'
        f"{plan.memory.needed / GIB:.2f} GiB needed</text>\n"
    )
    return "".join(parts)


def _colour(kind: str) -> str:
    return _COLOURS.get(kind, _OTHER_COLOUR)
