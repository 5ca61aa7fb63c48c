"""From text to batches: sources of documents, tokenizers, packed rows, and the loader that training reads from."""
