"""An evaluation as one web page that needs nothing else; the worst answers come first."""

from collections.abc import Sequence
from pathlib import Path

from mllama_jax.batch.pictures import PictureSources
from mllama_jax.batch.report_items import FOLDED_ANSWER, Item, Thumbnails, add_prompt
from mllama_jax.batch.report_page import FOOT, page_head, safe
from mllama_jax.evaluation.questions import Question, Questions
from mllama_jax.evaluation.scoring import Answered, counts, rows, sum_up

__all__ = ["write_page"]

_KINDS = ("wrong", "partly", "right", "error")


def write_page(
    path: Path,
    questions: Questions,
    answers: Sequence[Answered],
    *,
    sources: PictureSources,
    model_name: str,
    max_items: int = 500,
) -> None:
    """Writes the page; until it is complete, an earlier one stays.

    Args:
        path: of the page.
        questions: that were asked; nothing that they say is trusted.
        answers: of all of them.
        sources: where pictures may come from; they are read once more.
        model_name: whose answers they are.
        max_items: so many are shown: those with the lowest scores, and a tenth of right ones.

    Raises:
        OSError: the page can't be written.
    """
    shown = _chosen(answers, max_items)
    thumbnails = Thumbnails(sources)
    unfinished = path.with_name(f".{path.name}.incomplete")
    try:
        with unfinished.open("w", encoding="utf-8") as page:
            page.write(_head(model_name, answers, shown))
            for answer in shown:
                question = questions.question(answer.index)
                _item(questions, question, answer, thumbnails).write(page, thumbnails)
            page.write(FOOT)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _chosen(answers: Sequence[Answered], max_items: int) -> list[Answered]:
    ordered = sorted(answers, key=lambda answer: answer.score)
    right = [answer for answer in ordered if answer.score == 1]
    others = ordered[: len(ordered) - len(right)]
    num_right = min(len(right), max(max_items - len(others), max_items // 10))
    return others[: max_items - num_right] + right[:num_right]


def _kind(answer: Answered) -> str:
    if answer.error is not None:
        return "error"
    return "right" if answer.score == 1 else "partly" if answer.score else "wrong"


def _head(model_name: str, answers: Sequence[Answered], shown: Sequence[Answered]) -> str:
    scores = sum_up(answers)
    means = ", ".join(f"{metric} {found['all'].score:.1%}" for metric, found in scores.items())
    first, *others = rows(scores)
    cells = [_cells("th", first), *(_cells("td", row) for row in others)]
    lines = "".join(f"<tr>{line}</tr>\n" for line in cells)
    number = counts(answers)
    said = (
        f"{number['questions']:,} questions. {number['errors']:,} errors, {number['unparsed']:,} "
        f"answers that mean no choice, {number['cut']:,} cut at the limit of tokens."
    )
    if len(shown) < len(answers):
        said += f" Here are {len(shown):,}, the worst and some of the right ones."
    kinds = [_kind(answer) for answer in shown]
    labels = {kind: f"{kind} ({kinds.count(kind):,})" for kind in _KINDS if kind in kinds}
    introduction = f"<table>\n{lines}</table>\n<p>{said}</p>\n"
    return page_head(f"{model_name}: {means}", introduction, labels)


def _cells(tag: str, cells: Sequence[str]) -> str:
    return "".join(f"<{tag}>{safe(cell)}</{tag}>" for cell in cells)


def _item(
    questions: Questions, question: Question, answer: Answered, thumbnails: Thumbnails
) -> Item:
    kind, number = _kind(answer), answer.index + 1
    item = Item(kind)
    item.add(
        f'<article id="r{number}" class="{kind}">\n'
        f'<h2><span dir="auto">{safe(answer.id)}</span><a href="#r{number}">#{number}</a></h2>\n'
        f'<p class="note">{safe(answer.category)}</p>\n'
    )
    add_prompt(item, questions.asked(question), thumbnails)
    item.characters = 0  # A long prompt takes nothing from what became of it.
    item.add('<div class="role">expected</div>\n')
    item.add_text(_expected(question), FOLDED_ANSWER)
    message = ' class="message"' if answer.error is not None else ""
    item.add(f'<div class="reply"><div{message}>\n')
    item.add_text(answer.text if answer.error is None else answer.error, FOLDED_ANSWER)
    item.add(f'</div>\n<div class="note">{_note(answer)}</div></div>\n</article>\n')
    return item


def _expected(question: Question) -> str:
    if question.choices:
        return ". ".join(question.references)
    return "\n".join(
        f"{reference} (× {count})" if count > 1 else reference
        for reference in dict.fromkeys(question.references)
        if (count := question.references.count(reference))
    )


def _note(answer: Answered) -> str:
    said = [f"{metric} {score:.3g}" for metric, score in answer.scores.items()]
    if answer.letter is not None:
        said.append(f"understood as {answer.letter}")
    if answer.is_unparsed:
        said.append("means no choice")
    cut = ' · <span class="cut">length</span>' if answer.finish_reason == "length" else ""
    return safe(" · ".join(said)) + cut
