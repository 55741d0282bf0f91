"""Answers to questions compared with reference answers: metrics, scores and a page of them."""
