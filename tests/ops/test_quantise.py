"""The int8 and int4 formats: what the numpy definition promises, and that the compiled packer makes the same format."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from deltaic.errors import ArgumentError
from deltaic.ops import quantise, reference

SHAPES = [(1, 1), (16, 128), (17, 129), (33, 300), (5, 640)]
# mean squared error over mean square of normal numbers; 4.375 bits of the ideal quantiser would give 0.0035
NORMAL_ERROR = {"int8": 6e-5, "int4": 6.5e-3}


@pytest.fixture(scope="module")
def cpu() -> ModuleType:
    if importlib.util.find_spec("deltaic._core") is None:
        pytest.skip("deltaic._core is not built")
    return importlib.import_module("deltaic.ops.cpu")


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(((found - exact) ** 2).mean() / (exact**2).mean())


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_in_range_and_decode(rng, shape, dtype):
    matrix = rng.normal(size=shape).astype(np.float32)
    codes = quantise.quantise(matrix, dtype)
    runs = -(-shape[1] // 128)
    assert codes.values.shape == (shape[0], runs * 128)
    assert codes.scales.shape == (shape[0], runs * 8)
    assert codes.d.shape == (shape[0], runs)
    low, high = (-127, 127) if dtype == "int8" else (-8, 7)
    assert codes.values.min() >= low
    assert codes.values.max() <= high
    assert codes.scales.min() >= 1
    assert codes.scales.max() <= 16
    assert not codes.values[:, shape[1] :].any()
    # the formula, element by element
    found = codes.decode()
    for n, k in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)]:
        expected = np.float32(codes.d[n, k // 128]) * int(codes.scales[n, k // 16]) * int(codes.values[n, k])
        assert found[n, k] == np.float32(expected)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_error_on_normal_numbers(rng, dtype):
    matrix = rng.normal(size=(256, 512)).astype(np.float32)
    assert relative_error(quantise.quantise(matrix, dtype).decode(), matrix) < NORMAL_ERROR[dtype]


def test_integers_that_int8_holds_come_back_exactly(rng):
    matrix = rng.integers(-127, 128, (40, 256)).astype(np.float32)
    matrix[:, ::128] = -127
    np.testing.assert_array_equal(quantise.quantise(matrix, "int8").decode(), matrix)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_zero_rows_and_extreme_sizes(dtype):
    matrix = np.zeros((4, 200), np.float32)
    matrix[1] = 1e-12  # below the smallest float16 scale: rounds to zero
    matrix[2, 5] = 3.0
    found = quantise.quantise(matrix, dtype).decode()
    assert not found[[0, 1, 3]].any()
    assert found[2, 5] == pytest.approx(3.0, rel=0.03)
    assert np.count_nonzero(found) == 1


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_compiled_packer_writes_this_format(cpu, rng, shape, dtype):
    """The packed bytes, read by the definition of the layout, are the numbers, with no more error than the definition's
    own search leaves (1 % of room)."""
    matrix = (rng.standard_t(4, size=shape) * np.exp(rng.normal(size=(shape[0], 1)))).astype(np.float32)
    ((name, rows, data),) = cpu.packed_parts(cpu.pack([matrix], dtype))
    assert (name, rows) == (dtype, shape[0])
    found = quantise.unpack(data, dtype, 1, rows, shape[1])[0]
    if dtype in ("f32", "bf16"):
        exact = matrix if dtype == "f32" else matrix.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(found, exact)
    else:
        own = relative_error(quantise.quantise(matrix, dtype).decode(), matrix)
        assert relative_error(found, matrix) <= 1.01 * own + 1e-12


@pytest.mark.parametrize("dtype", ["f32", "bf16", "int8", "int4"])
def test_experts_gated_pairs_and_parts(cpu, rng, dtype):
    gate, up = (rng.normal(size=(3, 19, 70)).astype(np.float32) for _ in range(2))
    weight = cpu.pack_glu(gate, up, dtype)
    again = reference.from_packed(cpu.packed_parts(weight), 3, 70, True)
    assert again.shape == weight.shape == (3, 38, 70)
    assert again.is_glu
    assert again.nbytes == weight.nbytes
    np.testing.assert_allclose(again.matrix[:, :19], gate, atol=1.0)
    np.testing.assert_allclose(again.matrix[:, 19:], up, atol=1.0)
    np.testing.assert_array_equal(again.matrix[1:2], unpacked(cpu, gate[1], up[1], dtype))
    mixed = cpu.pack([gate[0], up[0][:5]], [dtype, "bf16"])
    again = reference.from_packed(cpu.packed_parts(mixed), 1, 70, False)
    assert again.shape == (24, 70)
    np.testing.assert_array_equal(again.matrix[19:], up[0][:5].astype(ml_dtypes.bfloat16).astype(np.float32))


def unpacked(cpu: ModuleType, gate: np.ndarray, up: np.ndarray, dtype: str) -> np.ndarray:
    ((_, rows, data),) = cpu.packed_parts(cpu.pack_glu(gate, up, dtype))
    return quantise.unpack(data, dtype, 1, rows, gate.shape[1], glu=True)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_both_op_sets_multiply_with_the_same_numbers(cpu, rng, dtype):
    """From the same bytes: exactly what the format says, and with rounded activations within their steps."""
    matrix, x = rng.normal(size=(40, 300)).astype(np.float32), rng.normal(size=(5, 300)).astype(np.float32)
    weight = cpu.pack([matrix], dtype)
    definition = reference.from_packed(cpu.packed_parts(weight), 1, 300, False)
    np.testing.assert_array_equal(cpu.embed(np.arange(40), weight), definition.matrix)
    exact = x.astype(np.float64) @ definition.matrix.T.astype(np.float64)
    size = np.abs(x) @ np.abs(definition.matrix.T)
    weight.float_activations = True
    np.testing.assert_array_less(np.abs(cpu.linear(x, weight) - exact), 1e-6 * size + 1e-9)
    weight.float_activations = False
    found = cpu.linear(x, weight)
    bound = 1.01 * np.abs(x).max() / 127 / 2 * np.abs(definition.matrix).sum(axis=1)  # half a step of every activation
    np.testing.assert_array_less(np.abs(found - exact), np.broadcast_to(bound, found.shape))
    assert np.abs(found - exact).max() > 1e-4  # they were rounded


def test_bf16_matrices_meet_rounded_activations_where_the_cpu_multiplies_pairs(cpu, rng):
    """Exactly those that round to nearest even; and unrounded ones if asked, or elsewhere."""
    matrix, x = rng.normal(size=(40, 131)).astype(np.float32), rng.normal(size=(9, 131)).astype(np.float32)
    weight = cpu.pack([matrix], "bf16")
    stored = matrix.astype(ml_dtypes.bfloat16).astype(np.float64)
    rounded = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    bound = 1e-6 * np.abs(x) @ np.abs(stored.T)
    rounds = importlib.import_module("deltaic._core").rounds_to_bf16
    for exact in (False, True):
        weight.float_activations = exact
        inputs = rounded if rounds and not exact else x.astype(np.float64)
        np.testing.assert_array_less(np.abs(cpu.linear(x, weight) - inputs @ stored.T), bound)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_reference_packs_what_the_format_can_hold(rng, dtype):
    matrix = rng.normal(size=(3, 20, 140)).astype(np.float32)
    weight = reference.pack([matrix], dtype)
    expected = [quantise.quantise(expert, dtype).decode() for expert in matrix]
    np.testing.assert_array_equal(weight.matrix, np.stack(expected))
    assert weight.dtype == dtype
    assert weight.nbytes == 60 * 2 * (130 if dtype == "int8" else 70)
    assert weight.float_activations is False


def test_sizes_and_refusals(cpu):
    for dtype in reference.FORMATS:
        for columns in (1, 2, 127, 128, 129, 4096):
            assert quantise.block_bytes(dtype, columns) == cpu.pack([np.zeros((16, columns), np.float32)], dtype).nbytes
    with pytest.raises(ArgumentError, match="unknown weight format 'int5'"):
        quantise.block_bytes("int5", 16)
    with pytest.raises(ArgumentError, match="expected 1120"):
        quantise.unpack(np.zeros(1119, np.uint8), "int4", 1, 16, 128)
    with pytest.raises(ArgumentError, match="unknown weight format"):
        reference.pack([np.zeros((2, 2), np.float32)], "int5")


# checksum


@pytest.mark.parametrize("lines", [0, 1, 2, 1023, 1024, 1025, 3000, 40000])
def test_checksum_is_the_same_everywhere(cpu, rng, lines):
    data = rng.integers(0, 256, 64 * lines, dtype=np.uint8)
    data.flags.writeable = False
    assert cpu.checksum(data) == quantise.checksum(data) == reference.checksum(data)
    middle = lines // 2048 * quantise.CHECKSUM_BYTES
    pieces = [(data[:middle], 0), (data[middle:], middle // quantise.CHECKSUM_BYTES)]
    for checksum in (cpu.checksum, quantise.checksum):
        assert sum(checksum(piece, first) for piece, first in pieces) % 2**64 == cpu.checksum(data)


def test_checksum_sees_every_change(rng):
    data = rng.integers(0, 256, 64 * 2050, dtype=np.uint8)
    sums = {quantise.checksum(data)}
    for byte in (0, 63, 64, 70000, len(data) - 1):
        changed = data.copy()
        changed[byte] ^= 1
        sums.add(quantise.checksum(changed))
    lines = data.reshape(-1, 64)
    swapped = lines.copy()
    swapped[[3, 900]] = swapped[[900, 3]]
    chunks = lines.copy()
    chunks[[0, 1024]] = chunks[[1024, 0]]
    zeroed = lines.copy()
    zeroed[100:164] = 0
    sums |= {quantise.checksum(np.ascontiguousarray(x).reshape(-1)) for x in (swapped, chunks, zeroed, lines[:-1])}
    assert len(sums) == 1 + 5 + 4


def test_checksum_refuses_what_is_no_line(cpu):
    for wrong in (np.zeros(63, np.uint8), np.zeros(65, np.uint8)):
        with pytest.raises(ValueError, match="64"):
            quantise.checksum(wrong)
        with pytest.raises(ValueError, match="64"):
            cpu.checksum(wrong)
