"""Text to batches: sources of documents, a tokenizer, packed rows and the loader that trains read from."""
