"""The text of one C file: functions, kernels, the graph, and the loop that steps through it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pyro_nfvi.engine.adam import CLIP_FACTOR, CLIP_WINDOW, SNAPSHOT_EVERY
from pyro_nfvi.engine.c import blas
from pyro_nfvi.engine.c.ir import C_TYPES, SUFFIXES, Unsupported
from pyro_nfvi.engine.c.lower import Lowering

HERE = Path(__file__).parent
HEAD = """#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#define VECTOR 64
#define MOST_ROWS 8
#elif defined(__AVX__)
#define VECTOR 32
#define MOST_ROWS 4
#else
#define VECTOR 16
#define MOST_ROWS 4
#endif
"""
# For each type: the macros of functions.c. Polynomials are Taylor's for exp (|r| < 0.35) and
# those of fdlibm (Sun Microsystems, 1993) for log.
REALS: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {
        "BITS": "uint32_t", "LIBM": "f", "MANTISSA": "23", "MANTISSA_MASK": "0x007fffffu",
        "ROUNDER": "0x1.8p23f", "LN2_HI": "6.9314575195e-01f", "LN2_LO": "1.4286067653e-06f",
        "LOG2_E": "1.4426950408889634f", "EXP_MAX": "89.f", "EXP_MIN": "(-104.f)",
        "EXPM1_MIN": "(-20.f)", "TINY": "1e-8f", "TANH_MAX": "10.f",
        "SMALLEST_NORMAL": "1.17549435e-38f", "TWO_TO_MANTISSA": "8388608.f",
        "EXPONENT": "((float)((int32_t)({0} >> 23) - 127))",
        "LOG_TAIL": (0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841), "order": 7},
    torch.float64: {
        "BITS": "uint64_t", "LIBM": "", "MANTISSA": "52", "MANTISSA_MASK": "0x000fffffffffffffull",
        "ROUNDER": "0x1.8p52", "LN2_HI": "6.93147180369123816490e-01",
        "LN2_LO": "1.90821492927058770002e-10", "LOG2_E": "1.4426950408889634",
        "EXP_MAX": "710.", "EXP_MIN": "(-746.)", "EXPM1_MIN": "(-40.)", "TINY": "1e-17",
        "TANH_MAX": "20.", "SMALLEST_NORMAL": "2.2250738585072014e-308",
        "TWO_TO_MANTISSA": "4503599627370496.",
        "EXPONENT": "(bits_to_f64(({0} >> 52) + 0x4330000000000000ull) - 4503599627371519.)",
        "LOG_TAIL": (6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                     2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                     1.479819860511658591e-01), "order": 13},
}
ROWS = (8, 4, 2, 1)  # of a block of a matrix product
UPDATE = (HERE / "adam.c").read_text()


def source(lowering: Lowering, num_states: int = 0) -> str:
    """C text of a graph, as a function of its own and inside a loop of Adam steps.

    Args:
        lowering: The graph.
        num_states: Number of inputs, the first ones, that are parameters; 0 for no loop.

    Raises:
        Unsupported: If the parameters are of different types.
    """
    body, arena = lowering.schedule.text()
    used = body + (f"_{SUFFIXES[lowering.inputs[0].dtype]}(" if num_states else "")
    asked = [text for _, text in lowering.functions.values()]
    parts = [HEAD, *functions(used + "".join(asked)), *asked, _graph_function(lowering, body),
             f"const int64_t arena_bytes = {arena};"]
    if num_states:
        parts.append(_loop(lowering, num_states))
    return "\n".join(parts)


def functions(body: str) -> list[str]:
    """The functions a text needs, for the types in it."""
    texts = []
    for dtype, suffix in SUFFIXES.items():
        if f"_{suffix}(" in body:
            texts.append(_functions(dtype))
            texts += [gemm(dtype)] if f"gemm_{suffix}(" in body else []
            texts += [blas.text(dtype)] if f"large_{suffix}(" in body else []
    return texts


@cache
def _functions(dtype: torch.dtype) -> str:
    text = (HERE / ("functions.c" if dtype in REALS else "functions_int.c")).read_text()
    for word, value in _macros(dtype):
        text = text.replace(word, value)
    return text


def _macros(dtype: torch.dtype) -> list[tuple[str, str]]:
    macros = [("SUF", SUFFIXES[dtype]), ("REAL", C_TYPES[dtype])]
    if dtype in REALS:
        table = dict(REALS[dtype])
        f = "f" if dtype == torch.float32 else ""
        tail = _polynomial([1 / _factorial(k) for k in range(2, int(table.pop("order")) + 1)],
                           "r", f)
        log_tail = "z * " + _polynomial(list(table.pop("LOG_TAIL")), "z", f)
        exponent = str(table.pop("EXPONENT")).format("b")
        macros += [("EXP_TAIL(r)", tail), ("LOG_TAIL(z)", f"({log_tail})"),
                   ("EXPONENT(b)", exponent)]
        macros += sorted(((k, str(v)) for k, v in table.items()), key=lambda kv: -len(kv[0]))
    return macros


def _polynomial(coefficients: Sequence[float], x: str, suffix: str) -> str:
    text = f"{coefficients[-1]!r}{suffix}"
    for c in reversed(coefficients[:-1]):
        text = f"({c!r}{suffix} + {x} * {text})"
    return text


def _factorial(k: int) -> int:
    return 1 if k < 2 else k * _factorial(k - 1)


def _graph_function(lowering: Lowering, body: str) -> str:
    pointers = [_pointer("const ", view.dtype, view.buffer.name, f"inputs[{k}]")
                for k, view in enumerate(lowering.inputs)]
    pointers += [_pointer("const ", view.dtype, view.buffer.name, f"constants[{k}]")
                 for k, (view, _) in enumerate(lowering.constants)]
    pointers += [_pointer("", view.dtype, view.buffer.name, f"outputs[{k}]")
                 for k, view in enumerate(lowering.outputs)]
    return ("void graph(const void** inputs, const void** constants, void** outputs, char* arena)"
            "\n{\n" + "\n".join(pointers) + "\n" + body + "\n}")


def _pointer(const: str, dtype: torch.dtype, name: str, value: str) -> str:
    kind = f"{const}{C_TYPES[dtype]}*"
    return f"{kind} {name} = ({kind}){value};"


def _loop(lowering: Lowering, num_states: int) -> str:
    states, draws = lowering.inputs[:num_states], lowering.inputs[num_states:]
    dtype, sizes = states[0].dtype, [view.buffer.size for view in states]
    if any(view.dtype != dtype for view in states):
        raise Unsupported("parameters of more than one type")
    words: dict[str, Any] = {
        "NUM_STATES": num_states, "NUM_DRAWS": len(draws), "STATE_SIZE": sum(sizes),
        "STATE_OFFSETS": ", ".join(str(sum(sizes[:k])) for k in range(num_states)),
        "DRAW_SIZES": ", ".join(str(v.buffer.size * v.dtype.itemsize) for v in draws) or "0",
        "NUM_INPUTS": len(lowering.inputs), "WINDOW": CLIP_WINDOW,
        "CLIP_FACTOR": CLIP_FACTOR, "SNAPSHOT_EVERY": SNAPSHOT_EVERY,
        "SUF": SUFFIXES[dtype], "REAL": C_TYPES[dtype]}
    text = UPDATE
    for word, value in words.items():
        text = text.replace(word, str(value))
    return text


@cache
def gemm(dtype: torch.dtype) -> str:
    """Kernels for ``C = A B`` whose columns lie side by side, by blocks held in registers."""
    suffix, kind = SUFFIXES[dtype], C_TYPES[dtype]
    text, calls = f"typedef {kind} s_{suffix};\n", ""
    for part, count in ((1, 2), (1, 1), (2, 1), (4, 1), (None, 1)):
        text += _sized(part, dtype, _blocks(part, count, dtype))
        calls += _sized(part, dtype, _sweep(part, count, dtype))
    return (f"{text}static __attribute__((noinline)) void gemm_{suffix}(int M, int N, int K, "
            f"const {kind}* A, int am, int ak, const {kind}* B, int bk, {kind}* C, int cm)\n"
            f"{{ int n = 0;\n{calls}}}\n")


def _sized(part: int | None, dtype: torch.dtype, text: str) -> str:
    """Text for processors whose vectors, or halves or quarters of them, hold two numbers."""
    return text if part is None else f"#if VECTOR >= {2 * part * dtype.itemsize}\n{text}#endif\n"


def _blocks(part: int | None, count: int, dtype: torch.dtype) -> str:
    suffix, kind, name = SUFFIXES[dtype], C_TYPES[dtype], f"v{part}" if part else "s"
    text = ""
    if part is not None and (part, count) != (1, 1):
        text = (f"typedef {kind} {name}_{suffix} __attribute__((vector_size(VECTOR / {part}), "
                f"aligned({dtype.itemsize}), may_alias));\n")
    return text + "".join(_block(f"{name}_{suffix}", kind, suffix, f"{name}{count}", count, rows)
                          for rows in ROWS)


def _sweep(part: int | None, count: int, dtype: torch.dtype) -> str:
    """Loops that cover as many columns as there are with blocks of one width."""
    name = f"v{part}" if part else "s"
    width = f"{count} * (VECTOR / {part * dtype.itemsize})" if part else "1"
    text = "".join(
        f"{'if (MOST_ROWS >= 8) ' if rows == 8 else ''}for (; m + {rows} <= M; m += {rows}) "
        f"block_{name}{count}_{rows}_{SUFFIXES[dtype]}(K, A + m * am, am, ak, B + n, bk, "
        "C + m * cm + n, cm);\n" for rows in ROWS)
    return f"for (; n + {width} <= N; n += {width}) {{ int m = 0;\n{text} }}\n"


def _block(vector: str, kind: str, suffix: str, name: str, count: int, rows: int) -> str:
    cells = [(i, j) for i in range(rows) for j in range(count)]
    declared = ", ".join(f"c{i}_{j} = {{0}}" if not vector.startswith("s_") else f"c{i}_{j} = 0"
                         for i, j in cells)
    loads = " ".join(f"const {vector} b{j} = *(const {vector}*)(B + k * bk + "
                     f"{j} * (int)(sizeof({vector}) / sizeof({kind})));" for j in range(count))
    steps = "\n".join(f"const {kind} a{i} = A[{i} * am + k * ak]; "
                      + " ".join(f"c{i}_{j} += a{i} * b{j};" for j in range(count))
                      for i in range(rows))
    stores = " ".join(f"*({vector}*)(C + {i} * cm + {j} * (int)(sizeof({vector}) / sizeof({kind})))"
                      f" = c{i}_{j};" for i, j in cells)
    return (f"static inline void block_{name}_{rows}_{suffix}(int K, const {kind}* A, int am, "
            f"int ak, const {kind}* B, int bk, {kind}* C, int cm)\n{{ {vector} {declared};\n"
            f"for (int k = 0; k < K; k++) {{ {loads}\n{steps} }}\n{stores} }}\n")
