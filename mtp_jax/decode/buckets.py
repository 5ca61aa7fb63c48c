"""What sizes are rounded up to, so that few compiled programs serve all requests."""

ALL_SIZES = 8
"""Batches up to so many rows are run as they are."""


def power(count: int, least: int) -> int:
    """The power of two at or above, and at least `least`."""
    return max(least, 1 << (count - 1).bit_length())


def bucket(length: int) -> int:
    """What a length is padded to, so that few programs serve all lengths."""
    return power(length, 16)


def padded(length: int, chunk: int) -> int:
    """What prompts are padded to: a bucket, or whole chunks of tokens."""
    return bucket(length) if length <= chunk else -(-length // chunk) * chunk


def batch_rows(count: int) -> int:
    """What a batch is filled up to: itself up to 8 rows, then four sizes up to every power of two (10, 12, 14, 16, 20).

    A row that only fills costs as much as another one; there are at most a quarter of them. A size that was not met
    before costs seconds of compiling, and programs that are kept. Up to 256 rows there are 28 sizes instead of 256.
    """
    if count <= ALL_SIZES:
        return count
    step = power(count, ALL_SIZES) // 8
    return -(-count // step) * step
