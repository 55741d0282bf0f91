"""Checkpoints in and out: any format to parameter trees and to any other format."""

from mllama_jax.convert.conversion import Report, convert, run_plan
from mllama_jax.convert.errors import CheckpointError
from mllama_jax.convert.inspection import Inspection, inspect
from mllama_jax.convert.load import load_params, load_pretrained
from mllama_jax.convert.plan import Plan, plan_conversion
from mllama_jax.convert.save import save_params
from mllama_jax.convert.sources import Source, open_source
from mllama_jax.convert.verification import Verification, verify

__all__ = [
    "CheckpointError",
    "Inspection",
    "Plan",
    "Report",
    "Source",
    "Verification",
    "convert",
    "inspect",
    "load_params",
    "load_pretrained",
    "open_source",
    "plan_conversion",
    "run_plan",
    "save_params",
    "verify",
]
