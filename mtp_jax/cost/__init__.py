"""Operations of a training step, and the peak figures of accelerators."""
