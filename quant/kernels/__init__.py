"""Float32 rows → blocks, by Bise's own kernels where they are built, else by ggml: the same bytes either way.

`best()` takes the widest build that this processor runs. Calls release the GIL, so threads run side by side. Knows
nothing of files. The kernels themselves are C++ (kernels.cpp), compiled at installation (build.py).
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UserError
from runtime.ggml import GgmlType, quantize, quantize_address, row_bytes
from runtime.levels import Search

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TYPES = (GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q5_K, GgmlType.Q6_K, GgmlType.Q8_0)
"""What the kernels make; all else is ggml's."""

SEARCHED = TYPES[:-1]
"""Types for which Search.BEST finds other blocks than ggml; of all else there is one way."""

_INTERFACE = 3
"""Of the functions in kernels.cpp. A library of another is taken for not built, until `make setup` builds it again."""

NAMES = {4: "4 lanes", 8: "8 lanes (AVX2)", 16: "16 lanes (AVX-512)"}


class KernelsError(UserError):
    """What is asked of kernels that are not there."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """One way to make blocks."""

    name: str
    lanes: int
    """Super-blocks made at a time; 0 for ggml."""
    library: ctypes.CDLL | None

    def encode(
        self,
        rows: "NDArray[np.float32]",
        type_: GgmlType,
        out: "NDArray[np.uint8]",
        importance: "NDArray[np.float32] | None" = None,
        search: Search = Search.GGML,
        means: "NDArray[np.float32] | None" = None,
    ) -> None:
        """Store finite rows (n_rows, row_length) as `type_` into `out` (n_rows * row_bytes,).

        `importance` (row_length,), finite and not negative, weighs the error of each column. `means` (row_length,), of
        what each column is multiplied with, are for the best search alone. Raises KernelsError where `search` is more
        than these kernels can.
        """
        self.check(type_, search)
        if self.library is None or type_ not in TYPES:
            quantize(rows, type_, out, importance)
            return
        n_rows, row_length = rows.shape
        assert rows.dtype == "float32", rows.dtype
        assert all(array.flags.c_contiguous for array in (rows, out))
        assert out.nbytes == n_rows * row_bytes(type_, row_length), (out.nbytes, n_rows, row_length, type_.name)
        for columns in (importance, means):
            if columns is not None:
                assert columns.dtype == "float32", columns.dtype
                assert columns.shape == (row_length,), (columns.shape, row_length)
                assert columns.flags.c_contiguous
        referred = self.library.bise_kernels_quantize(
            type_,
            search is Search.BEST,
            rows.ctypes.data,
            n_rows,
            row_length,
            importance.ctypes.data if importance is not None else None,
            means.ctypes.data if means is not None else None,
            out.ctypes.data,
            quantize_address(),
        )
        assert referred >= 0, type_

    def check(self, type_: GgmlType, search: Search) -> None:
        """Raise KernelsError where `search` is more than these kernels can do for a type."""
        if search is Search.BEST and type_ in SEARCHED and self.library is None:
            raise KernelsError(
                f"{self.name}'s kernels know only ggml's search, and {type_.name} is wanted by the best; leave out "
                "--kernels reference, or install g++ and run `make setup` again, or take --search ggml"
            )


GGML = Kernels("ggml", 0, None)
"""llama.cpp's own."""


@cache
def built() -> Mapping[int, Kernels]:
    """Lanes → kernels, of all builds that are there and that this processor runs."""
    found = {lanes: library for lanes in NAMES if (library := _open(lanes)) is not None}
    if 4 not in found:
        return {}
    best_lanes = found[4].bise_kernels_best_lanes()
    return {lanes: Kernels(NAMES[lanes], lanes, found[lanes]) for lanes in found if lanes <= best_lanes}


def best() -> Kernels:
    """The widest that can be used; ggml's where none is built."""
    return built()[max(built())] if built() else GGML


def _open(lanes: int) -> ctypes.CDLL | None:
    path = Path(__file__).parent / f"kernels-{lanes}.so"
    try:
        library = ctypes.CDLL(str(path))
        count, pointer = ctypes.c_int64, ctypes.c_void_p
        library.bise_kernels_quantize.argtypes = [
            ctypes.c_int,
            ctypes.c_bool,
            pointer,
            count,
            count,
            *[pointer] * 4,
        ]
        library.bise_kernels_quantize.restype = ctypes.c_int64
        library.bise_kernels_best_lanes.argtypes = []
        if library.bise_kernels_interface() != _INTERFACE:
            return None
    except (OSError, AttributeError):  # not built, of another processor, or older than this source
        return None
    return library
