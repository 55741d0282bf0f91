"""Names that rematerialisation policies know."""

ATTENTION_RESULT = "attention_result"
"""Marks what the backward pass of attention needs beside queries, keys and values."""
