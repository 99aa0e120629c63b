"""The names of the set operations on bitmaps."""

from typing import Final, Literal, get_args

Op = Literal["or", "and", "xor", "subtract"]
OPS: Final[tuple[Op, ...]] = get_args(Op)
