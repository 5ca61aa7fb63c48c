"""GGUF files, the one-file checkpoints of llama.cpp: metadata, tokenizer and packed tensors."""
