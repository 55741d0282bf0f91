"""Training data: files of conversations, and the batches of arrays made of them."""
