"""Quantised checkpoints: not read, but recognised and refused by name."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.lazy import LazyTensor
from mllama_jax.convert.mismatch import merged

_METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fbgemm_fp8": "FP8 (FBGEMM)",
    "fp8": "FP8",
    "fp_quant": "FP-Quant",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "MXFP4",
    "quanto": "Quanto",
    "quark": "AMD Quark",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
"""quant_method in config.json -> what people call it."""

_CAN_BE_UNDONE = ("bitsandbytes", "HIGGS")
"""Methods that transformers' `dequantize()` undoes (4.54.1); they begin like this."""

_TELL_TALES = (
    # The first that fits is taken, so the more particular ones come first.
    ((".weight.quant_state.bitsandbytes__nf4",), "bitsandbytes, 4 bits (NF4)"),
    ((".weight.quant_state.bitsandbytes__fp4",), "bitsandbytes, 4 bits (FP4)"),
    ((".weight.quant_map", ".weight.absmax"), "bitsandbytes, 4 bits"),
    ((".SCB", ".weight_format"), "bitsandbytes, 8 bits"),
    ((".g_idx",), "GPTQ"),
    ((".qweight", ".qzeros"), "GPTQ or AWQ"),
    ((".weight_packed", ".weight_shape"), "compressed-tensors"),
    ((".codebooks", ".codes"), "AQLM"),
    ((".W_q",), "HQQ"),
    ((".weight._data", ".weight._scale"), "Quanto"),
    ((".weight_scale", ".weight_scale_inv", ".input_scale"), "FP8 or 8-bit integers with scales"),
    ((".scales", ".biases"), "MLX"),
)
"""How names of tensors end -> the method that stores such tensors."""


def refuse_quantised(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], folder: epath.Path
) -> None:
    """Raises if a folder holds a quantised model; says which kind, and what to do.

    Weights of a dtype that parameters don't have are found when they are matched with the model's:
    those of a part that is not wanted do no harm.

    Args:
        config: config.json as it stands; may be empty.
        tensors: the folder's, by stored name; may be empty for a folder without readable weights,
            in which GGUF files are then looked for.
        folder: for the error.

    Raises:
        CheckpointError: config.json names a method; tensors have names that only quantised
            checkpoints have; or there are GGUF files and nothing else.
    """
    found = next(_signs(config, tensors, folder), None)
    if found is None:
        return
    method, sign = found
    if method.startswith(_CAN_BE_UNDONE):
        undo = (
            ", or dequantise this one with transformers first:\n"
            f"  model = MllamaForConditionalGeneration.from_pretrained({os.fspath(folder)!r})\n"
            '  model.dequantize().save_pretrained("NEW_FOLDER")'
        )
    else:
        undo = "; transformers can't dequantise this kind"
    raise CheckpointError(
        f"{os.fspath(folder)} is quantised with {method} ({sign}), which is not read. Convert the "
        f"checkpoint that it was made from (for a LoRA adapter: give that as its base){undo}"
    )


def _signs(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], folder: epath.Path
) -> Iterator[tuple[str, str]]:
    """(method, how it is known), the surest first."""
    for part in ("", "text_config", "vision_config"):
        values = config.get(part) if part else config
        if isinstance(values, Mapping):
            yield from _declared(values, f"{part}." if part else "")
    for endings, method in _TELL_TALES:
        names = [name for name in tensors if name.endswith(endings)]
        if names:
            yield method, f"it holds {_few(names)}"
    if not tensors:
        files = sorted(file.name for file in folder.glob("*.gguf"))
        if files:
            yield "llama.cpp", f"GGUF files: {_few(files)}"


def _declared(config: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """What config.json says: the usual entry, compressed-tensors' older one, and MLX's."""
    for entry in ("quantization_config", "compression_config", "quantization"):
        values = config.get(entry)
        if not values:
            continue
        sign = f"{where}{entry} in config.json"
        if not isinstance(values, Mapping):
            yield "an unknown method", sign
        elif entry == "quantization":
            yield f"MLX, {values.get('bits', '?')} bits", sign
        else:
            named = values.get("quant_method", "")
            if not named and entry == "compression_config":
                named = "compressed-tensors"
            yield from _method(str(named), values, sign)


def _method(named: str, values: Mapping[str, Any], sign: str) -> Iterator[tuple[str, str]]:
    # Configurations of 2023 name no method.
    four, eight = bool(values.get("load_in_4bit")), bool(values.get("load_in_8bit"))
    if named in ("", "bitsandbytes") and "load_in_8bit" in values:
        if four or eight:
            yield f"bitsandbytes, {4 if four else 8} bits", sign
        return
    method = _METHODS.get(named.lower(), f"the method {named!r}" if named else "an unknown method")
    bits = values.get("bits")
    yield f"{method}, {bits} bits" if isinstance(bits, int) else method, sign


def _few(names: list[str]) -> str:
    lines = merged(names)
    return ", ".join(lines[:2]) + (", …" if len(lines) > 2 else "")
