"""Reads GGUF files, the checkpoints of llama.cpp in one file: metadata, tokenizer and packed tensors."""
