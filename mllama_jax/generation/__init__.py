"""Answers from a model: prefill, the compiled decode loop, sampling, stopping, streaming."""
