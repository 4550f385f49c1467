"""Rational-quadratic splines in one pass, forwards and backwards; only their inputs are stored.

The formulas are those of ``flows/spline.py``, which is also the truth of the tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from pyro_nfvi.engine.c.ir import C_TYPES, SUFFIXES, View, loops
from pyro_nfvi.engine.c.ops import opname, rule

if TYPE_CHECKING:
    from pyro_nfvi.engine.c.lower import Lowering, Value

# In each direction: names of the inputs beside the parameters, and of the outputs. An output
# named `gp` has one value for each parameter.
SIGNATURES = {"spline_forward": ("u", "z l"), "spline_inverse": ("z", "u l"),
              "spline_backward": ("u gz gl", "gu gp"),
              "spline_inverse_backward": ("u gu gl", "gz gp")}

BIN = """
const REAL d0 = softplus_SUF(q0 + ZERO_SLOPE, 1, 20) + MIN_SLOPE;
const REAL d1 = softplus_SUF(q1 + ZERO_SLOPE, 1, 20) + MIN_SLOPE;
const REAL s = h / w, bend = d1 + d0 - 2 * s;
const REAL th = tanh_SUF(raw / MAX_LOG_SCALE), scale = MAX_LOG_SCALE * th;
"""
CURVE = """
const REAL rest = 1 - xi, mixed = xi * rest, den = s + bend * mixed;
const REAL a = s * xi * xi + d0 * mixed, num = d1 * xi * xi + 2 * s * mixed + d0 * rest * rest;
const REAL slope = (s / den) * (s / den) * num;
"""
FORWARD = BIN + """
const REAL t = (v - x) / w, xi = t < 0 ? 0 : (t > 1 ? 1 : t);
""" + CURVE + """
const REAL value = y + h * a / den + slope * (u - v);
z_out[i] = shift + value * exp_SUF(scale);
l_out[i] = log_SUF(slope) + scale;
"""
INVERSE = BIN + """
const REAL height = v - y, curve = height * bend;
const REAL qa = h * (s - d0) + curve, qb = h * d0 - curve, qc = -s * height;
const REAL disc = qb * qb - 4 * qa * qc;
const REAL root = sqrt_SUF(disc < SMALLEST ? SMALLEST : disc);
const REAL t = 2 * qc / (-qb - root), xi = t < 0 ? 0 : (t > 1 ? 1 : t);
""" + CURVE + """
const REAL steep = value == v ? slope : (value > 0 ? d1 : d0);
u_out[i] = x + w * xi + (value - v) / steep;
l_out[i] = -log_SUF(steep) - scale;
"""
# Of the inverse: u solves z = f(u, p), so its gradients are those of f at u, turned round.
TURN = """
const REAL num_1 = 2 * (d1 * xi + s * (1 - 2 * xi) - d0 * rest), den_1 = bend * (1 - 2 * xi);
const REAL inner = (v == u) & (t >= 0) & (t <= 1);
const REAL bent = inner * (num_1 / num - 2 * den_1 / den) / w;
const REAL gz_out_i = (gu - gl_given * bent) / (slope * exp_SUF(scale));
gz_out[i] = gz_out_i;
const REAL gz = -gz_out_i, gl = -gl_given;
"""
BACKWARD = """
const REAL e = exp_SUF(scale), q = a / den, value = y + h * q + slope * (u - v);
const REAL gval = gz * e, gscale = gval * value + gl;
const REAL gslope = gl / slope + gval * (u - v);
const REAL gnum = gslope * (s / den) * (s / den), ga = gval * h / den;
const REAL gden = -2 * gslope * slope / den - ga * q;
REAL gs = gslope * 2 * s * num / (den * den) + gnum * 2 * mixed + ga * xi * xi
  + gden * (1 - 2 * mixed);
const REAL gmixed = gnum * 2 * s + ga * d0 + gden * bend;
const REAL gd0 = gnum * rest * rest + (ga + gden) * mixed;
const REAL gd1 = gnum * xi * xi + gden * mixed;
const REAL gxi_all = gnum * 2 * (d1 * xi - d0 * rest) + ga * 2 * s * xi + gmixed * (1 - 2 * xi);
const REAL gxi = (v == u) & (t >= 0) & (t <= 1) ? gxi_all : 0;  // in the tails its paths cancel
const REAL gh = gval * q + gs / w, gx = -gxi / w, gw = -(gs * s + gxi * t) / w;
const REAL gv = -gval * slope + gxi / w;
const REAL gu_i = gval * slope + (v == u ? gv : 0);
const REAL gq0 = gd0 * sigmoid_SUF(q0 + ZERO_SLOPE), gq1 = gd1 * sigmoid_SUF(q1 + ZERO_SLOPE);
"""


@rule(*SIGNATURES)
def _spline(lowering: Lowering, node: fx.Node, *args: Any) -> list[View]:
    *values, num_bins, bound, constants = args
    names, results = (names.split() for names in SIGNATURES[opname(node)])
    x, params, *gradients = values
    dtype = lowering.expr(x).dtype
    inner = _inner(lowering, params)
    inputs = {name: _unit(lowering, value, inner)
              for name, value in zip(names, [x, *gradients], strict=True)}
    given = _unit(lowering, params, inner)
    outputs = {name: lowering.empty(given.shape if name == "gp" else inputs[names[0]].shape, dtype,
                                    given.strides if name == "gp" else inputs[names[0]].strides)
               for name in results}
    function = _function(lowering, opname(node), num_bins, bound, tuple(constants), dtype)
    text = _calls(function, given, inputs, outputs, inner)
    lowering.schedule.kernel(text, [given, *inputs.values()], list(outputs.values()))
    return list(outputs.values())


def _inner(lowering: Lowering, params: Value) -> int:
    """The dimension along which elements lie side by side: of the batch, or the coordinates."""
    view = lowering.view(params)
    runs = [d for d in range(len(view.shape) - 1) if view.strides[d] == 1]
    return max(runs, key=lambda d: view.shape[d], default=len(view.shape) - 2)


def _unit(lowering: Lowering, value: Value, inner: int) -> View:
    view = lowering.view(value)
    if view.strides[inner] == 1:
        return view
    order = [*(stride + 1 for stride in view.strides)]
    order[inner] = 0
    return lowering.copied(view, tuple(order))


def _calls(function: str, params: View, inputs: dict[str, View], outputs: dict[str, View],
           inner: int) -> str:
    """One call for each run of elements that lie side by side."""
    outer = [d for d in range(len(params.shape) - 1) if d != inner]

    def place(view: View) -> str:
        terms = [f"i{d} * {view.strides[d]}" for d in outer]
        return " + ".join([view.buffer.name, str(view.offset), *terms])
    pointers = [place(v) for v in [params, *inputs.values(), *outputs.values()]]
    steps = [params.strides[-1]] + [v.strides[-1] for name, v in outputs.items() if name == "gp"]
    return f"{loops(outer, params.shape)}{function}({params.shape[inner]}, " \
        f"{', '.join(str(s) for s in steps)}, {', '.join(pointers)});"


def _function(lowering: Lowering, name: str, num_bins: int, bound: float,
              constants: tuple[float, ...], dtype: torch.dtype) -> str:
    """Name of the C function for these options, which joins the file if it is new."""
    key = (name, num_bins, bound, constants, dtype)
    if key not in lowering.functions:
        called = f"{name}_{len(lowering.functions)}"
        lowering.functions[key] = (called, _text(called, *key))
    return lowering.functions[key][0]


def _text(called: str, name: str, num_bins: int, bound: float, constants: tuple[float, ...],
          dtype: torch.dtype) -> str:
    names, results = (names.split() for names in SIGNATURES[name])
    steps = ["int step"] + (["int gstep"] if "gp" in results else [])
    pointers = ["const REAL* p", *(f"const REAL* {n}_in" for n in names),
                *(f"REAL* {n}_out" for n in results)]
    given = {"gl": "gl_given"} if name == "spline_inverse_backward" else {}
    loads = " ".join(f"const REAL {given.get(n, n)} = {n}_in[i];" for n in names)
    body = loads + _search(num_bins, name == "spline_inverse")
    if name in ("spline_forward", "spline_inverse"):
        body += FORWARD if name == "spline_forward" else INVERSE
    else:
        xi = "const REAL t = (v - x) / w, xi = t < 0 ? 0 : (t > 1 ? 1 : t);"
        body += BIN + xi + CURVE + (TURN if name == "spline_inverse_backward" else "") + BACKWARD
        body += ("" if name == "spline_inverse_backward" else "gu_out[i] = gu_i;\n")
        body += _parameter_gradients(num_bins)
    text = (f"static __attribute__((noinline)) void {called}_block({', '.join(steps + pointers)})"
            f"\n{{\n#pragma GCC ivdep\nfor (int i = 0; i < LANES; i++) {{\n{body}}} }}\n"
            + _by_blocks(called, names, results, 3 * num_bins + 3))
    zero_slope, min_bin, min_slope, max_log_scale = constants
    suffix = "f" if dtype == torch.float32 else ""
    text = text.replace("LANES", str(64 // dtype.itemsize))
    words = {"ZERO_SLOPE": zero_slope, "MIN_SLOPE": min_slope, "MAX_LOG_SCALE": max_log_scale,
             "SMALLEST": torch.finfo(dtype).tiny, "BOUND": bound, "LEAST": 2 * bound * min_bin,
             "SHARE": 2 * bound * (1 - min_bin * num_bins)}
    for word, value in words.items():
        text = text.replace(word, f"({float(value)!r}{suffix})")
    return text.replace("SUF", SUFFIXES[dtype]).replace("REAL", C_TYPES[dtype])


def _by_blocks(called: str, names: list[str], results: list[str], num_params: int) -> str:
    """The function over any number of elements; the last block is padded."""
    sizes = {name: num_params if name in ("p", "gp") else 1 for name in ["p", *names, *results]}
    steps = ["step"] + (["gstep"] if "gp" in results else [])
    step_of = {"p": "step", "gp": "gstep"}
    pointers = [f"const REAL* {n}" for n in ["p", *names]] + [f"REAL* {n}" for n in results]
    pads = " ".join(f"REAL {n}_pad[{size} * LANES];" for n, size in sizes.items())
    fill = "\n".join(
        f"for (int k = 0; k < {size}; k++) for (int j = 0; j < LANES; j++) "
        f"{n}_pad[k * LANES + j] = {n}[k * {step_of.get(n, '0')} + i + (j < rest ? j : 0)];"
        for n, size in sizes.items() if n not in results)
    out = "\n".join(
        f"for (int k = 0; k < {sizes[n]}; k++) for (int j = 0; j < rest; j++) "
        f"{n}[k * {step_of.get(n, '0')} + i + j] = {n}_pad[k * LANES + j];" for n in results)
    return (f"static void {called}(int count, {', '.join('int ' + s for s in steps)}, "
            f"{', '.join(pointers)})\n{{ int i = 0;\n"
            f"for (; i + LANES <= count; i += LANES) {called}_block({', '.join(steps)}, "
            f"{', '.join(f'{n} + i' for n in sizes)});\n"
            f"const int rest = count - i;\nif (rest) {{ {pads}\n{fill}\n"
            f"{called}_block({', '.join(['LANES'] * len(steps))}, "
            f"{', '.join(f'{n}_pad' for n in sizes)});\n{out} }} }}\n")


def _search(num_bins: int, by_height: bool) -> str:
    """Bin sizes, and the bin of the clamped value ``v``: x, y, w, h, raw end slopes, index."""
    count = num_bins
    lines = [f"const REAL p{k} = p[{k} * step + i];" for k in range(3 * count + 3)]
    for name, start in (("a", 0), ("b", count)):
        lines.append(f"REAL m{name} = p{start};")
        lines += [f"m{name} = p{k} > m{name} ? p{k} : m{name};"
                  for k in range(start + 1, start + count)]
        lines += [f"const REAL {name}{k} = exp_SUF(p{start + k} - m{name});" for k in range(count)]
        lines.append(f"const REAL n{name} = 1 / ("
                     + " + ".join(f"{name}{k}" for k in range(count)) + ");")
    lines.append(f"const REAL shift = p{3 * count + 1}, raw = p{3 * count + 2};")
    value = "u"
    if by_height:
        lines.append("const REAL value = (z - shift) * exp_SUF(-MAX_LOG_SCALE * "
                     "tanh_SUF(raw / MAX_LOG_SCALE));")
        value = "value"
    lines.append(f"const REAL v = {value} < -BOUND ? -BOUND : ({value} > BOUND ? BOUND : {value});")
    lines += [f"const REAL w{k} = SHARE * (a{k} * na) + LEAST, h{k} = SHARE * (b{k} * nb) + LEAST;"
              for k in range(count)]
    lines.append(f"REAL x = -BOUND, y = -BOUND, w = w0, h = h0, q0 = p{2 * count}, "
                 f"q1 = p{2 * count + 1}, at = 0, right = -BOUND, top = -BOUND;")
    for k in range(count - 1):
        knot = "top" if by_height else "right"
        lines.append(f"right += w{k}; top += h{k}; {{ const _Bool on = {knot} <= v; "
                     f"x = on ? right : x; y = on ? top : y; w = on ? w{k + 1} : w; "
                     f"h = on ? h{k + 1} : h; q0 = on ? p{2 * count + k + 1} : q0; "
                     f"q1 = on ? p{2 * count + k + 2} : q1; at = on ? {k + 1} : at; }}")
    return "\n".join(lines) + "\n"


def _parameter_gradients(num_bins: int) -> str:
    """Gradients of the raw parameters from those of the bin."""
    lines = []
    for size, edge, own, start in (("a", "gx", "gw", 0), ("b", "gval", "gh", num_bins)):
        for k in range(num_bins):
            lines.append(f"const REAL g{size}{k} = at > {k} ? {edge} : (at == {k} ? {own} : 0);")
            lines.append(f"const REAL f{size}{k} = {size}{k} * n{size};")
        mean = " + ".join(f"f{size}{k} * g{size}{k}" for k in range(num_bins))
        lines.append(f"const REAL o{size} = {mean};")
        lines += [f"gp_out[{start + k} * gstep + i] = SHARE * f{size}{k} * (g{size}{k} - o{size});"
                  for k in range(num_bins)]
    lines += [f"gp_out[{2 * num_bins + k} * gstep + i] = (at == {k} ? gq0 : 0) + "
              f"(at == {k - 1} ? gq1 : 0);" for k in range(num_bins + 1)]
    lines.append(f"gp_out[{3 * num_bins + 1} * gstep + i] = gz;")
    lines.append(f"gp_out[{3 * num_bins + 2} * gstep + i] = gscale * (1 - th * th);")
    return "\n".join(lines) + "\n"
