"""How far a quantised model is from the one that it was made of."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from mllama_jax.loss import IGNORED_LABEL, cross_entropy, shift_labels
from mllama_jax.pretrained import Params, PretrainedModule
from mllama_jax.quantisation import dequantised, num_inputs_of
from mllama_jax.shapes import Array


@dataclass(frozen=True)
class Divergence:
    """Two models' distributions of the same next tokens.

    Attributes:
      tokens: that were predicted.
      mean_kl, max_kl: Kullback-Leibler divergence of the quantised model's distribution from the
        other's, in nats.
      top1_agreement: the share of tokens of which both find the same one most likely.
      perplexity, quantised_perplexity: of the labels.
    """

    tokens: int
    mean_kl: float
    max_kl: float
    top1_agreement: float
    perplexity: float
    quantised_perplexity: float


def compare(
    model: PretrainedModule,
    params: Params,
    quantised_model: PretrainedModule,
    quantised_params: Params,
    batches: Iterable[Mapping[str, Array]],
) -> Divergence:
    """Compares what two models predict for the labels of the same inputs.

    Args:
      model, params: as the checkpoint has them.
      quantised_model, quantised_params: of the same checkpoint.
      batches: the models' inputs, with "labels" (B, T): -100 where nothing counts.

    Raises:
      ValueError: no label counts.
    """
    total: dict[str, Any] = {}
    largest = 0.0
    for batch in batches:
        found = _compare(model, quantised_model, params, quantised_params, dict(batch))
        largest = max(largest, float(found.pop("max_kl")))
        total = {name: total.get(name, 0.0) + float(value) for name, value in found.items()}
    if not total.get("tokens"):
        raise ValueError("there is nothing to compare: no label counts")
    tokens = int(total["tokens"])
    return Divergence(
        tokens=tokens,
        mean_kl=total["kl"] / tokens,
        max_kl=largest,
        top1_agreement=total["agreeing"] / tokens,
        perplexity=math.exp(total["loss"] / tokens),
        quantised_perplexity=math.exp(total["quantised_loss"] / tokens),
    )


@partial(jax.jit, static_argnums=(0, 1))
def _compare(
    model: PretrainedModule,
    quantised_model: PretrainedModule,
    params: Params,
    quantised_params: Params,
    batch: dict[str, Array],
) -> dict[str, Array]:
    labels = shift_labels(jnp.asarray(batch.pop("labels")))
    inputs: Any = batch
    outputs: tuple[Any, Any] = (
        model.apply({"params": params}, **inputs, use_cache=False),
        quantised_model.apply({"params": quantised_params}, **inputs, use_cache=False),
    )
    logits, other = (output.logits.astype(jnp.float32) for output in outputs)
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)
    counts = labels != IGNORED_LABEL
    kl = jnp.where(counts, (jnp.exp(log_p) * (log_p - log_q)).sum(-1), 0)
    agreeing = counts & (logits.argmax(-1) == other.argmax(-1))
    return {
        "tokens": counts.sum(),
        "kl": kl.sum(),
        "max_kl": kl.max(),
        "agreeing": agreeing.sum(),
        "loss": cross_entropy(logits, labels)[0],
        "quantised_loss": cross_entropy(other, labels)[0],
    }


def weight_errors(params: Params, quantised_params: Params) -> dict[str, tuple[float, ...]]:
    """The signal-to-quantisation-noise ratio of each kernel in decibels, of every layer.

    Returns:
      The kernel's path -> the ratios of the layers that are stacked in it; infinite where nothing
      was lost.
    """
    flat = flax.traverse_util.flatten_dict(params)
    quantised = flax.traverse_util.flatten_dict(quantised_params)
    return {
        "/".join(path): tuple(
            float(_decibels(weights, values, scale))
            for weights, values, scale in zip(
                flat[path], kernel, quantised[*path[:-1], "scale"], strict=True
            )
        )
        for path, kernel in quantised.items()
        if jnp.issubdtype(kernel.dtype, jnp.integer)
    }


@jax.jit
def _decibels(weights: Array, values: Array, scale: Array) -> Array:
    weights = weights.astype(jnp.float32)
    noise = weights - dequantised(values, scale, num_inputs_of(values, scale))
    return 10 * jnp.log10(jnp.square(weights).sum() / jnp.square(noise).sum())
