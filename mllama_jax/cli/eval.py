"""``mllama-jax eval``: questions with pictures asked, and the answers scored."""

import dataclasses
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mllama_jax.cli.answering import NOT_RUN, JobOptions, Work, defaults, leave, run
from mllama_jax.cli.options import Attention, Dtype, Quantise
from mllama_jax.cli.tables import columns

if TYPE_CHECKING:
    from mllama_jax.evaluation.questions import Questions

# Said here a second time, so that --help need not load JAX.
Metric = Literal["exact_match", "vqa", "anls", "relaxed_accuracy", "multiple_choice"]


def eval(
    model: str,
    input_file: Annotated[str, tyro.conf.arg(aliases=("-i",), metavar="FILE")],
    output_folder: Annotated[Path, tyro.conf.arg(aliases=("-o",), metavar="DIR")],
    metric: Annotated[tuple[Metric, ...], tyro.conf.UseAppendAction] = (),
    suffix: str = "",
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int | None = None,
    allow_folder: Annotated[
        tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")
    ] = (),
    retry_errors: bool = False,
    grace: float = 30.0,
    num_slots: int | None = None,
    max_length: int | None = None,
    max_tiles: int | None = None,
    dtype: Dtype = "float32",
    attention: Attention = "xla",
    quantise: Quantise | None = None,
    mesh: str | None = None,
    distributed: bool = False,
    compilation_cache: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    date: str | None = None,
    revision: str | None = None,
) -> None:
    """Ask a file of questions about pictures, and score the answers.

    Into the output folder go results.jsonl (as `mllama-jax batch` writes it), scores.json,
    answers.jsonl (a score for each question) and report.html. Stopped or killed at any moment, the
    same command carries on; another --metric only scores again. The exit status is 0 if every
    question was answered, 1 if some have an error in place of an answer (which scores 0), 2 if the
    job could not run, 130 or 143 if SIGINT or SIGTERM stopped it.

    For example:
      $ mllama-jax eval --model FOLDER -i questions.jsonl -o results --metric anls

    Args:
        model: Hugging Face folder or hub id.
        input_file: questions with their answers: .jsonl, .parquet, .array_record, a saved data set.
        output_folder: where results go.
        metric: how answers are compared; give the option once for each. By default
            multiple_choice for questions with choices, vqa for those that ten people have answered,
            exact_match for others.
        suffix: written below each question, such as "Answer with a single word or phrase."
        max_tokens: the longest answer; as many tokens as there is room for, if these are fewer.
        temperature: 0 takes the most likely token, always the same.
        seed: of the draw, if the temperature is not 0; otherwise each question has its own.
        allow_folder: pictures are read from it, and from folders below; give the option once for
            each folder. Relative paths start at the first. If not given, the folder of the
            questions.
        retry_errors: ask those again whose result is an error.
        grace: seconds for what has begun when SIGTERM or SIGINT stops the job.
        num_slots: questions that are answered at the same time.
        max_length: tokens of a question, prompt and answer together.
        max_tiles: tiles of all pictures of a question together. These three are chosen from the
            memory there is, if not given.
        dtype: of parameters and computation.
        attention: how attention is computed: "splash" has kernels for TPUs, "cudnn" for NVIDIA
            GPUs, "xla" runs anywhere, "reference" is slow and simple.
        quantise: store the decoder layers' weights in 8 or 4 bits: less memory, less exact.
        mesh: devices of this process to split model and questions over, such as tensor=4 or
            data=2,tensor=4; -1 stands for all that are left. One device if not given.
        distributed: this is one process of several, each on a host of its own and started with the
            same command. Each takes its part of the questions; the first one scores all.
        compilation_cache: where compiled programs are kept for later starts; by default
            JAX_COMPILATION_CACHE_DIR or ~/.cache/mllama_jax/compiled.
        date: today's date as the chat template is to say it. A job that is carried on keeps it.
        revision: of a hub id.
    """
    given = locals()
    results = given.pop("output_folder") / "results.jsonl"
    try:
        # Of batch's metrics, which are speeds, nobody would think here.
        status = run_eval(EvalOptions(**given, output_file=results, metrics=None))
    except (OSError, ValueError, FloatingPointError, ImportError) as error:
        print(f"mllama-jax: {error}", file=sys.stderr)
        leave(NOT_RUN)
    except Exception:
        # Otherwise it would end like a job with errors among its results.
        traceback.print_exc()
        leave(NOT_RUN)
    if status:
        sys.exit(status)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions(JobOptions):
    """Of the command, by the same names; ``output_file`` is of the results."""

    input_file: str
    metric: tuple[Metric, ...]
    suffix: str
    allow_folder: tuple[Path, ...]


def run_eval(options: EvalOptions) -> int:
    """What ``mllama-jax eval`` does; returns its exit status."""
    from mllama_jax.batch.inputs import Shard

    def finish(work: Work, results: Path, is_complete: bool) -> None:
        if is_complete:
            _score(options, work, results)

    return run(options, Shard(), lambda: _work(options), finish)


def _work(options: EvalOptions) -> Work:
    from mllama_jax.batch.pictures import PictureSources
    from mllama_jax.evaluation.questions import Questions
    from mllama_jax.evaluation.scoring import check_metrics
    from mllama_jax.train.data.pictures import is_in_bucket

    for folder in options.allow_folder:
        if not folder.is_dir():
            raise ValueError(f"--allow-folder {folder}: no such folder")
    questions = Questions(
        options.input_file,
        defaults(options),
        suffix=options.suffix,
        folder=options.allow_folder[0] if options.allow_folder else None,
    )
    check_metrics(questions, options.metric)
    local = tuple(Path(folder) for folder in questions.folders if not is_in_bucket(folder))
    sources = PictureSources(options.allow_folder or local)
    identity = {"questions": questions.fingerprint, "suffix": options.suffix}
    return Work(questions, sources, identity)


def _score(options: EvalOptions, work: Work, results: Path) -> None:
    """Scores all answers, writes that down, and prints the table."""
    from mllama_jax.evaluation.page import write_page
    from mllama_jax.evaluation.scoring import counts, rows, score_answers, sum_up, write_scores

    questions: Questions | Any = work.source
    answers = list(score_answers(questions, results, options.metric))
    write_scores(results.parent, questions, answers, results)
    write_page(
        results.with_name("report.html"),
        questions,
        answers,
        sources=work.pictures,
        model_name=str(options.model),
    )
    number = counts(answers)
    print(f"\n{columns(rows(sum_up(answers)), right=(2, 3, 4))}\n")
    print(
        f"{number['errors']:,} errors, {number['unparsed']:,} answers that mean no choice, "
        f"{number['cut']:,} cut at the limit of tokens"
    )
    print(f"{results.parent}: scores.json, answers.jsonl, and report.html to look at", flush=True)
