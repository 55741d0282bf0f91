"""Text and pictures to the arrays that a model is called with, and token ids back to text."""
