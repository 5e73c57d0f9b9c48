"""Decoding on GPUs: which there are, their memory, and what runs on them."""
