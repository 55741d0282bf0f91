"""The frame of a page of answers: what stands around the items, how it looks, what its few
buttons do. Nothing in it comes from outside, and its policy lets a browser fetch and run nothing
else, whatever the requests say."""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from html import escape

__all__ = ["FOOT", "head", "page_head", "safe"]

# Halves of surrogate pairs, which no file can hold, and control characters.
_UNWRITABLE = re.compile("[\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --dim: #5c6773; --page: #f3f5f7; --card: #fff;
  --line: #dde2e7; --red: #b3261e; --amber: #8a5a00; --green: #1b7f4b; --field: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --dim: #9aa5b1; --page: #14181c;
  --card: #1d2328; --line: #343c44; --red: #ff8a80; --amber: #e9b44c; --green: #6fd09b;
  --field: #262d34; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 900px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; margin: .5rem 0; overflow-wrap: anywhere; }
p { margin: .4rem 0; }
form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .4rem 1rem;
  align-items: center; padding: .6rem 0; background: var(--page); }
form[hidden], article[hidden] { display: none; }
input[type=search] { flex: 1 1 12rem; font: inherit; padding: .3rem .6rem; color: inherit;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  border-left: 4px solid var(--green); padding: .7rem 1rem; margin: .8rem 0; }
article.error, article.wrong { border-left-color: var(--red); }
article.partly { border-left-color: var(--amber); }
table { border-collapse: collapse; }
th, td { padding: .1rem 1.5rem .1rem 0; text-align: right; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
h2 { font-size: 1rem; margin: 0 0 .4rem; display: flex; gap: 1rem;
  justify-content: space-between; overflow-wrap: anywhere; }
h2 a { color: var(--dim); font-weight: normal; text-decoration: none; white-space: nowrap; }
.role, .note, figcaption { color: var(--dim); font-size: .8rem; }
.role { text-transform: uppercase; letter-spacing: .05em; margin-top: .5rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.reply { background: var(--field); border-radius: 6px; padding: .5rem .7rem; margin: .5rem 0; }
.message { color: var(--red); }
.cut { color: var(--amber); }
figure { display: inline-block; margin: .4rem .6rem .4rem 0; max-width: 100%;
  vertical-align: top; }
figure img { display: block; height: 160px; max-width: 100%; object-fit: contain;
  object-position: left; }
figcaption { max-width: 20rem; overflow-wrap: anywhere; }
.unread { width: 16rem; min-height: 160px; max-width: 100%; padding: .6rem; font-size: .8rem;
  overflow-wrap: anywhere; color: var(--dim); background: var(--field);
  border: 1px dashed var(--dim); border-radius: 4px; }
details[open] .beginning { display: none; }
summary { cursor: pointer; }
"""

_SCRIPT = """
"use strict";
for (const image of document.querySelectorAll("img[data-copy-of]"))
  image.src = document.getElementById(image.dataset.copyOf).src;
const form = document.getElementById("filter");
const plain = (text) => text.toLowerCase().replace(/[ \\t\\n]+/g, " ");
const items = Array.from(document.querySelectorAll("article"),
  (element) => ({ element, text: plain(element.textContent) }));
function filter() {
  const kind = form.elements.kind.value;
  const words = plain(form.elements.words.value.trim());
  let shown = 0;
  for (const { element, text } of items) {
    element.hidden = Boolean(kind && !element.classList.contains(kind))
      || !text.includes(words);
    shown += !element.hidden;
  }
  form.elements.shown.value = shown + " shown";
}
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
filter();
"""

FOOT = f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"


def head(model_name: str, totals: Counter[str], shown: Counter[str]) -> str:
    """What comes before the items of a batch job.

    Args:
        model_name: whose answers they are.
        totals: of all results: "answer", "error", "prompt_tokens" and "completion_tokens".
        shown: of the items on the page: "answer" and "error".
    """
    title = (
        f"{model_name}: {_count(totals['answer'], 'answer')}, {_count(totals['error'], 'error')}"
    )
    tokens = f"{totals['prompt_tokens']:,} tokens in, {totals['completion_tokens']:,} out"
    kinds = {kind: f"{kind}s ({shown[kind]:,})" for kind in ("answer", "error")}
    return page_head(title, f"<p>{tokens}.</p>\n{_left_out(totals, shown)}", kinds)


def page_head(title: str, introduction: str, kinds: Mapping[str, str]) -> str:
    """What comes before the items of a page.

    Args:
        title: text.
        introduction: HTML below the title.
        kinds: of items, by the class that their ``article`` has: the text beside the button that
            shows only these.
    """
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(_STYLE)}; "
        f"script-src {_hash(_SCRIPT)}; base-uri 'none'; form-action 'none'"
    )
    buttons = "".join(
        f'<label><input type="radio" name="kind" value="{safe(kind)}"> {safe(text)}</label>\n'
        for kind, text in kinds.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{safe(title)}</h1>
{introduction}<form id="filter" hidden>
<label><input type="radio" name="kind" value="" checked> all</label>
{buttons}<input type="search" name="words" placeholder="search" aria-label="search">
<output name="shown" class="note"></output>
</form>
"""


def safe(text: str) -> str:
    """Text that stands in a page, also between double quotes, as itself and nothing else."""
    return escape(_UNWRITABLE.sub("\ufffd", text))


def _left_out(totals: Counter[str], shown: Counter[str]) -> str:
    answers, errors = (totals[kind] - shown[kind] for kind in ("answer", "error"))
    if not answers and not errors:
        return ""
    return (
        f"<p>Here are the first {shown.total():,} results, with some of each kind. "
        f"{_count(answers, 'answer')} and {_count(errors, 'error')} are left out; "
        "the file of results has all.</p>\n"
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
