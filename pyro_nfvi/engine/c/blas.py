"""Torch's own matrix product, which generated code calls for large matrices."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from pyro_nfvi.engine.c.ir import C_TYPES, SUFFIXES

LARGE = 4_000_000  # multiplications from which threads and tuning beat a call's cost
TOO_LARGE = 40_000_000  # and from which generated code on one core is too slow
SYMBOLS = {torch.float32: "sgemm_", torch.float64: "dgemm_"}
# Fortran's product of the transposes. Sizes have 64 bits: a library that reads 32 of them sees the
# same numbers, as the small end comes first.
TEXT = """
typedef void (*product_SUF)(const char*, const char*, const int64_t*, const int64_t*,
    const int64_t*, const REAL*, const REAL*, const int64_t*, const REAL*, const int64_t*,
    const REAL*, REAL*, const int64_t*);
product_SUF blas_SUF;
static void large_SUF(int64_t M, int64_t N, int64_t K, const REAL* A, int64_t lda, int turn_a,
                      const REAL* B, int64_t ldb, int turn_b, REAL* C, int64_t ldc)
{ REAL one = 1, zero = 0;
  blas_SUF(turn_b ? "T" : "N", turn_a ? "T" : "N", &N, &M, &K, &one, B, &ldb, A, &lda, &zero, C,
           &ldc); }
"""


@cache
def address(dtype: torch.dtype) -> int | None:
    """Where torch's matrix product is; None if its library has none by the usual name."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*")):
        try:
            symbol = getattr(ctypes.CDLL(str(path)), SYMBOLS[dtype])
        except (OSError, AttributeError, KeyError):
            continue
        return ctypes.cast(symbol, ctypes.c_void_p).value
    return None


def text(dtype: torch.dtype) -> str:
    """C text of ``large_f32`` or ``large_f64``."""
    return TEXT.replace("SUF", SUFFIXES[dtype]).replace("REAL", C_TYPES[dtype])


def connect(library: ctypes.CDLL) -> None:
    """Tell a loaded library where torch's matrix products are."""
    for dtype in SYMBOLS:
        name = f"blas_{SUFFIXES[dtype]}"
        if hasattr(library, name):
            ctypes.c_void_p.in_dll(library, name).value = address(dtype)
