"""Large matrix products go to torch's own library, whatever way the matrices lie."""

from __future__ import annotations

import pytest
import torch

from pyro_nfvi.engine.c import blas, products
from pyro_nfvi.engine.c.ir import Unsupported
from pyro_nfvi.engine.c.program import CProgram
from pyro_nfvi.engine.record import record

has_blas = pytest.mark.skipif(blas.address(torch.float32) is None,
                              reason="torch's library shows no matrix product")
ROWS, INNER, COLUMNS = 130, 201, 170  # over four million multiplications


def matrices(dtype, turn_a, turn_b):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=dtype)
            for shape in ((ROWS, INNER), (INNER, COLUMNS)))
    return [m.T.contiguous() if turned else m for m, turned in ((a, turn_a), (b, turn_b))]


def compiled(inputs, turn_a, turn_b, spoken):
    a, b = inputs
    recording = record(lambda: [(a.T if turn_a else a) @ (b.T if turn_b else b)], inputs)
    program = CProgram(recording, inputs, [])
    suffix = "f32" if a.dtype == torch.float32 else "f64"
    assert hasattr(program.library, f"blas_{suffix}") == spoken
    return program(inputs, [])[0]


@has_blas
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("turn_a", [False, True], ids=["a", "a-turned"])
@pytest.mark.parametrize("turn_b", [False, True], ids=["b", "b-turned"])
def test_a_large_product_is_right_however_its_factors_lie(dtype, turn_a, turn_b):
    assert ROWS * INNER * COLUMNS >= blas.LARGE
    inputs = matrices(dtype, turn_a, turn_b)
    result = compiled(inputs, turn_a, turn_b, spoken=True)
    a, b = (m.double().T if turned else m.double()
            for m, turned in zip(inputs, (turn_a, turn_b), strict=True))
    error = (result.double() - a @ b).abs().max().item()
    assert error < 50 * torch.finfo(dtype).eps * (a.abs() @ b.abs()).max().item()


def test_without_the_library_generated_code_does_it(monkeypatch):
    monkeypatch.setattr(blas, "address", lambda dtype: None)
    a, b = inputs = matrices(torch.float64, False, False)
    torch.testing.assert_close(compiled(inputs, False, False, spoken=False), a @ b)


def test_without_the_library_a_product_too_large_for_one_core_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(blas, "address", lambda dtype: None)
    monkeypatch.setattr(products.blas, "TOO_LARGE", 1000)
    with pytest.raises(Unsupported, match="a large matrix product"):
        compiled(matrices(torch.float64, False, False), False, False, spoken=False)
