"""``mllama-jax generate``: one prompt, with or without pictures, answered on the terminal."""

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import tyro

from mllama_jax.cli.options import Attention, Dtype, Quantise, print_choices


def generate(
    model: str,
    prompt: str,
    image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    system: str | None = None,
    raw: bool = False,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    stream: bool = True,
    date: str | None = None,
    dtype: Dtype = "float32",
    attention: Attention = "xla",
    quantise: Quantise | None = None,
    mesh: str | None = None,
    distributed: bool = False,
    revision: str | None = None,
) -> None:
    """Answer one prompt about any number of pictures.

    The answer is written to the terminal as it grows. How tokens are chosen is what the
    checkpoint's generation_config.json says, unless an option says otherwise.

    Args:
        model: Hugging Face folder or hub id.
        prompt: what to ask; "-" reads it from standard input.
        image: a picture's path; give the option once for each picture, in their order.
        system: a system message before the prompt.
        raw: continue the prompt as it stands, without the chat template (for base models). Special
            tokens in it count; image tokens are put in front if it has none.
        max_new_tokens: the longest answer.
        temperature: 0 takes the most likely token; above it, tokens are drawn.
        top_k: draw among so many most likely tokens; 0 for all.
        top_p: draw among the most likely tokens that add up to this probability.
        min_p: draw among tokens at least so likely, relative to the most likely.
        seed: of the draw; the same seed gives the same answer.
        stop: end the answer at this text; may be given several times.
        stream: write the answer as it grows, otherwise at the end.
        date: today's date as the chat template is to say it, for answers that can be repeated.
        dtype: of parameters and computation.
        attention: how attention is computed: "splash" has kernels for TPUs, "cudnn" for NVIDIA
            GPUs, "xla" runs anywhere, "reference" is slow and simple.
        quantise: store the decoder layers' weights in 8 or 4 bits: less memory, less exact.
        mesh: devices to split model and computation over, such as tensor=8 or data=2,tensor=4; -1
            stands for all that are left. One device if not given.
        distributed: this is one process of several, each on a host of its own and started with the
            same command; the first one prints.
        revision: of a hub id.
    """
    import mllama_jax as mj

    if distributed:
        from mllama_jax.distributed import join_processes

        join_processes()
    if prompt == "-":
        prompt = sys.stdin.read()
    processor = mj.MllamaProcessor.from_pretrained(model, revision=revision)
    if raw:
        inputs = _raw_inputs(processor, prompt, image, system)
    else:
        inputs = _chat_inputs(processor, prompt, image, system, date)
    module, params = mj.MllamaForConditionalGeneration.from_pretrained(
        model,
        dtype=dtype,
        attention=attention,
        quantise=quantise,
        mesh=mesh,
        revision=revision,
    )
    print_choices(module)
    options = _sampling_options(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if stop:
        options["stop_strings"] = stop

    def show(_: int, piece: str) -> None:
        print(piece, end="", flush=True)

    generated = module.generate(
        params,
        **inputs,
        **options,
        max_new_tokens=max_new_tokens,
        seed=seed,
        tokenizer=processor.tokenizer,
        streamer=show if stream else None,
    )
    if stream:
        print()
    else:
        new = generated.sequences[0, inputs["input_ids"].shape[1] :]
        print(processor.decode(new, skip_special_tokens=True))


def _sampling_options(**given: float | None) -> dict[str, Any]:
    """What was asked for; any of it means a draw, but for temperature 0."""
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.get("temperature") == 0:
        if len(options) > 1:
            raise ValueError(
                "--temperature 0 takes the most likely token, so it excludes "
                + " and ".join(f"--{n.replace('_', '-')}" for n in options if n != "temperature")
            )
        return {"do_sample": False}
    return {**options, "do_sample": True} if options else {}


def _chat_inputs(
    processor: Any, prompt: str, images: tuple[str, ...], system: str | None, date: str | None
) -> Any:
    messages = list(_messages(prompt, images, system))
    variables = {} if date is None else {"date_string": date}
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
        **variables,
    )


def _messages(prompt: str, images: tuple[str, ...], system: str | None) -> Iterator[dict[str, Any]]:
    if system is not None:
        yield {"role": "system", "content": system}
    pictures = [{"type": "image", "image": path} for path in images]
    yield {"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]}


def _raw_inputs(processor: Any, prompt: str, images: tuple[str, ...], system: str | None) -> Any:
    if system is not None:
        raise ValueError("--system needs the chat template; leave out --raw, or --system")
    if processor.image_token not in prompt:
        prompt = processor.image_token * len(images) + prompt
    return processor(
        images=[list(images)] if images else None,
        text=[prompt],
        allow_special_tokens=True,
        return_tensors="np",
    )
