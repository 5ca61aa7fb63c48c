"""The Byte Latent Transformer (arXiv:2412.09871), a trunk that reads bytes and thinks in patches of bytes."""
