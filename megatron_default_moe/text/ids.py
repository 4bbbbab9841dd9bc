"""Token ids as bytes: which type holds them, and which are not the tokenizer's."""

from typing import Any

from numpy.typing import NDArray


def dtype_of(vocabulary: int) -> str:
    """Megatron's choice for this many ids (``DType.optimal_dtype``): two bytes or four."""
    return "uint16" if vocabulary < 65500 else "int32"


def outside(ids: NDArray[Any], vocabulary: int) -> int | None:
    """Return a token id that is not in ``range(vocabulary)``: the largest, or else the smallest."""
    if not ids.size:
        return None
    largest, smallest = int(ids.max()), int(ids.min())
    if largest >= vocabulary:
        return largest
    return smallest if smallest < 0 else None
