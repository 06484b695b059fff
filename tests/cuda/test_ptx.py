"""The PTX machine that runs what nvcc makes of the kernels (csrc/cuda/simt/ptx.h): PTX written by hand, whose results
are known from NVIDIA's description of it, and kernels that are broken on purpose where only nvcc's code shows it.

The tests of operators run on the machine too: see conftest.py."""

from __future__ import annotations

import emulator
import ml_dtypes
import numpy as np
import pytest
import torch
from deltaic.ops import cuda, reference
from helpers import array, assert_close, normal, reference_weight, tensor

KERNEL = """
.version 8.0
.target sm_90
.address_size 64
.entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1)
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .f32 %f<32>;
    .reg .b32 %r<64>;
    .reg .b64 %rd<16>;
    .shared .align 16 .b8 scratch[{scratch}];
    ld.param.u64 %rd1, [kernel_param_0];
    ld.param.u64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %rd3, %r1, {input};
    add.s64 %rd4, %rd1, %rd3;
    mul.wide.u32 %rd5, %r1, {output};
    add.s64 %rd6, %rd2, %rd5;
    mov.u32 %r3, scratch;
    shl.b32 %r4, %r1, 2;
    add.s32 %r5, %r3, %r4;
    {body}
    ret;
}}
"""


def run(emulated, body, given, results, threads=32, blocks=1, scratch=256):
    """Thread i has its row of `given` at [%rd4], puts its results at [%rd6], has a word of shared memory at [%r5]."""
    device = emulator.EmulatedDevice(emulated)
    given = np.ascontiguousarray(given, np.uint32)
    x, y = device.empty(given.shape, torch.uint32), device.empty([threads, results], torch.uint32)
    x.numpy()[:] = given
    text = KERNEL.format(body=body, input=given[0].nbytes, output=4 * results, scratch=scratch)
    emulated.run_ptx(text, "kernel", blocks, threads, 0, [x.data_ptr(), y.data_ptr()])
    return y.numpy()


def bits(x):
    return np.array(x, np.float32).view(np.uint32)


def names(kind, first, count):
    return ", ".join(f"%{kind}{i}" for i in range(first, first + count))


def load(kind, first, count):
    return "".join(f"ld.global.u32 %{kind}{first + i}, [%rd4+{4 * i}];\n" for i in range(count))


def store(kind, first, count):
    return "".join(f"st.global.u32 [%rd6+{4 * i}], %{kind}{first + i};\n" for i in range(count))


@pytest.mark.parametrize("operands", ["bf16", "tf32"])
def test_products_of_fragments(emulated, rng, operands):
    """A lane's registers, as the figures of the PTX ISA have them."""
    K = 16 if operands == "bf16" else 8
    A, B, C = normal(rng, 16, K), normal(rng, K, 8), normal(rng, 16, 8)
    if operands == "bf16":
        A, B = A.astype(ml_dtypes.bfloat16).astype(np.float32), B.astype(ml_dtypes.bfloat16).astype(np.float32)
    given = np.zeros((32, 10), np.uint32)
    pair = lambda low, high: bits(low) >> 16 | bits(high) & 0xFFFF0000  # noqa: E731
    for lane in range(32):
        g, t = divmod(lane, 4)
        if operands == "bf16":
            corners = [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)]
            given[lane, :4] = [pair(A[r, c], A[r, c + 1])[()] for r, c in corners]
            given[lane, 4:6] = [pair(B[k, g], B[k + 1, g])[()] for k in (2 * t, 2 * t + 8)]
        else:
            given[lane, :4] = bits([A[g, t], A[g + 8, t], A[g, t + 4], A[g + 8, t + 4]])
            given[lane, 4:6] = bits([B[t, g], B[t + 4, g]])
        given[lane, 6:] = bits([C[g, 2 * t], C[g, 2 * t + 1], C[g + 8, 2 * t], C[g + 8, 2 * t + 1]])
    shape = f"m16n8k{K}.row.col.f32.{operands}.{operands}.f32"
    body = load("r", 10, 6) + "".join(f"ld.global.f32 %f{i}, [%rd4+{24 + 4 * i}];\n" for i in range(4))
    body += f"mma.sync.aligned.{shape} {{{names('f', 4, 4)}}}, {{{names('r', 10, 4)}}}, {{{names('r', 14, 2)}}}, "
    body += f"{{{names('f', 0, 4)}}};\n" + "".join(f"st.global.f32 [%rd6+{4 * i}], %f{4 + i};\n" for i in range(4))
    found = run(emulated, body, given, 4).view(np.float32)
    if operands == "tf32":  # 19 bits of each
        A, B = ((bits(x) & 0xFFFFE000).view(np.float32) for x in (A, B))
    D = A.astype(np.float64) @ B + C
    for lane in range(32):
        g, t = divmod(lane, 4)
        wanted = [D[g, 2 * t], D[g, 2 * t + 1], D[g + 8, 2 * t], D[g + 8, 2 * t + 1]]
        np.testing.assert_allclose(found[lane], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(emulated, mode, width):
    """Those of CUDA's __shfl functions, which nvcc makes these operands for."""
    control = (32 - width) << 8 | (0 if mode == "up" else 31)
    body = load("r", 10, 2) + f"shfl.sync.{mode}.b32 %r12|%p1, %r10, %r11, {control}, -1;\nselp.b32 %r13, 1, 0, %p1;\n"
    values, steps = np.arange(100, 132), np.arange(32) * 5 % 7 if mode == "idx" else np.full(32, 3)
    found = run(emulated, body + store("r", 12, 2), np.stack([values, steps], 1), 2)
    for lane in range(32):
        first = lane - lane % width
        at = {"up": lane - 3, "down": lane + 3, "bfly": lane ^ 3, "idx": first + steps[lane] % width}[mode]
        inside = first <= at < first + width
        assert tuple(found[lane]) == (values[at if inside else lane], inside)


def one_up(x):
    return np.nextafter(np.float32(x), np.float32(np.inf))


INTEGERS = {  # three numbers, what the instruction makes of them
    "prmt.b32 %r13, %r10, %r11, %r12": [((0x33221100, 0x77665584, 0xC740), 0xFF778400)],
    "bfi.b32 %r13, %r10, %r11, 8, 4": [((0xABCD, 0x12345678, 0), 0x12345D78)],
    "lop3.b32 %r13, %r10, %r11, %r12, 0xEA": [((0xFF00FF00, 0x0FF00FF0, 0x3), 0x0F000F03)],
    "bfind.shiftamt.u32 %r13, %r10": [((1, 0, 0), 31), ((0, 0, 0), 0xFFFFFFFF)],
    "shr.s32 %r13, %r10, %r11": [((0x80000000, 40, 0), 0xFFFFFFFF), ((0x40, 3, 0), 8)],
    "shl.b32 %r13, %r10, %r11": [((1, 32, 0), 0), ((3, 31, 0), 0x80000000)],
    "mul.hi.u32 %r13, %r10, %r11": [((0xFFFFFFFF, 0xFFFFFFFF, 0), 0xFFFFFFFE)],
    "add.cc.u32 %r20, %r10, %r11; addc.u32 %r13, %r12, 0": [((0xFFFFFFFF, 1, 5), 6), ((1, 1, 5), 5)],
    "sub.cc.u32 %r20, %r10, %r11; subc.u32 %r13, %r12, 0": [((0, 1, 5), 4), ((1, 1, 5), 5)],
    # the source may be wider than what is converted
    "mov.b64 %rd9, {%r10, %r11}; cvt.s64.s32 %rd10, %rd9; mov.b64 {%r20, %r13}, %rd10": [
        ((0x80000000, 5, 0), 0xFFFFFFFF), ((1, 5, 0), 0)
    ],
    "brev.b32 %r13, %r10": [((0x1, 0, 0), 0x80000000)],
    "div.s32 %r13, %r10, %r11": [((-7 & 0xFFFFFFFF, 2, 0), -3 & 0xFFFFFFFF)],
    "rem.s32 %r13, %r10, %r11": [((-7 & 0xFFFFFFFF, 2, 0), -1 & 0xFFFFFFFF)],
}  # fmt: skip
FLOATS = {
    # 1 + 2^-30 towards minus infinity and zero, and the same below zero
    "fma.rm.f32 %f13, %f10, %f11, %f12": [((2**-15, 2**-15, 1.0), 1.0), ((2**-15, -(2**-15), -1.0), -one_up(1.0))],
    "add.rz.f32 %f13, %f10, %f11": [
        ((1.0, 2**-30, 0), 1.0), ((one_up(1.0), -(2**-30), 0), 1.0), ((-1.0, -(2**-30), 0), -1.0)
    ],
    # joined: the product is not rounded
    "fma.rn.f32 %f13, %f10, %f11, %f12": [((1 + 2**-12, 1 + 2**-12, -(1 + 2**-11)), 2**-24)],
    "cvt.sat.f32.f32 %f13, %f10": [((7.0, 0, 0), 1.0), ((-1.0, 0, 0), 0.0), ((np.nan, 0, 0), 0.0)],
    "max.f32 %f13, %f10, %f11": [((np.nan, 3.0, 0), 3.0), ((2.0, np.nan, 0), 2.0)],
    "copysign.f32 %f13, %f10, %f11": [((-1.0, 3.0, 0), -3.0)],
    "ex2.approx.ftz.f32 %f13, %f10": [((3.0, 0, 0), 8.0), ((-140.0, 0, 0), 0.0)],
    "cvt.rn.bf16.f32 %rs1, %f10; mov.u16 %rs2, 0; mov.b32 %f13, {%rs2, %rs1}": [
        ((1 + 2**-8, 0, 0), 1.0), ((1 + 3 * 2**-8, 0, 0), 1 + 2**-6), ((1 + 2**-8 + 2**-20, 0, 0), 1 + 2**-7)
    ],
    "mov.b32 {%rs1, %rs2}, %r10; cvt.f32.f16 %f13, %rs2": [
        ((np.uint32(0x3C000000).view(np.float32), 0, 0), 1.0),
        ((np.uint32(0x80010000).view(np.float32), 0, 0), -(2.0**-24)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("code", [*INTEGERS, *FLOATS])
def test_numbers(emulated, code):
    cases = INTEGERS.get(code) or [(bits(x), bits(y)[()]) for x, y in FLOATS[code]]
    for given, wanted in cases:
        body = (
            load("r", 10, 3)
            + load("f", 10, 3)
            + code
            + f";\nst.global.u32 [%rd6], %{'r' if code in INTEGERS else 'f'}13;"
        )
        assert run(emulated, body, np.tile(np.array(given, np.uint32), (32, 1)), 1)[0, 0] == wanted


def test_two_bfloat16_are_rounded_once(emulated, rng):
    given = normal(rng, 32, 6).astype(ml_dtypes.bfloat16)
    given[:, 4:] = (given[:, :2] * given[:, 2:4]) * np.array(-1, ml_dtypes.bfloat16)  # nearly cancels
    found = run(
        emulated,
        load("r", 10, 3) + "fma.rn.bf16x2 %r13, %r10, %r11, %r12;" + store("r", 13, 1),
        given.view(np.uint32),
        1,
    )
    x = given.astype(np.float64)
    np.testing.assert_array_equal(
        found.view(ml_dtypes.bfloat16), (x[:, :2] * x[:, 2:4] + x[:, 4:]).astype(ml_dtypes.bfloat16)
    )


def test_lanes_meet_again(emulated):
    """After branches and a loop of another length in every lane, all take part in a shuffle."""
    body = """
    mov.u32 %r10, 0;
    mov.u32 %r11, 0;
loop:
    add.s32 %r10, %r10, %r11;
    add.s32 %r11, %r11, 1;
    setp.le.u32 %p1, %r11, %r1;
    @%p1 bra loop;
    shfl.sync.idx.b32 %r12|%p2, %r10, 31, 31, -1;
    """
    found = run(emulated, body + store("r", 10, 1) + "st.global.u32 [%rd6+4], %r12;", np.zeros((32, 1)), 2)
    assert (found == [[i * (i + 1) // 2, 31 * 32 // 2] for i in range(32)]).all()


WORD = "st.shared.u32 [%r5], %r1; "
OTHER = "xor.b32 %r6, %r4, 4; add.s32 %r7, %r3, %r6; ld.shared.u32 %r8, [%r7]; "
HALF = "setp.lt.u32 %p1, %r1, 16; @%p1 bra skip; "
REFUSED = {
    "tanh.approx.f32 %f1, %f2": "does not run, the opcode tanh.approx.f32",
    "add.s32 %r6, %r1, %rd1": "%rd1 has 64 bits, expected 32",
    "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1+4]": "not aligned to 16 bytes",
    "ld.global.u32 %r6, [%rd4+4]": r"access to byte 128 of device buffer '.*' of 128 bytes.*thread 31 of block",
    "ld.shared.u32 %r6, [%r3+256]": "access to byte 256 of 256 bytes of shared memory",
    "st.global.u32 [%rd6], %r40": "a register is stored that was never set",
    "ld.global.u32 %r6, [%rd9]": "an address that was never set",
    "@%p7 bra skip; skip:": "a predicate that was never set",
    HALF + "bar.sync 0; skip:": "some threads never reach a barrier.*16 of 32 threads have returned",
    HALF + "shfl.sync.bfly.b32 %r6|%p2, %r1, 1, 31, -1; bra.uni end; skip: bar.warp.sync -1; end:": "never reach",
    HALF + "bar.warp.sync 0xffff; skip:": "not in its own mask",
    WORD + OTHER: "race on shared memory byte [0-9]*: read of what was written by thread",
    OTHER + WORD: "race on shared memory byte [0-9]*: overwrites what was read by thread",
    HALF + "griddepcontrol.wait; skip:": "ends before the kernels before it have",
    "st.global.u32 [%rd6], %r1; griddepcontrol.wait": "is used before those before have ended",
    "st.shared.u32 [%r3], %r1": "race on shared memory byte 0: written also by thread 0",
    "st.global.u32 [%rd2], %r1": "race on byte 0 of device buffer .*: written also by thread 0",
}  # fmt: skip


@pytest.mark.parametrize("code", REFUSED)
def test_what_hardware_leaves_undefined_is_an_error(emulated, code):
    with pytest.raises(emulated.KernelError, match=REFUSED[code]):
        run(emulated, code + ("" if code.endswith(":") else ";"), np.zeros((32, 1)), 1)


def test_barriers_order_what_lanes_and_blocks_do(emulated):
    zeros = np.zeros((64, 1))
    found = run(emulated, WORD + "bar.warp.sync -1; " + OTHER + store("r", 8, 1), zeros[:32], 1)
    assert (found[:, 0] == np.arange(32) ^ 1).all()
    across = OTHER.replace("%r4, 4", "%r4, 128")  # of the other warp
    with pytest.raises(emulated.KernelError, match="race on shared memory"):
        run(emulated, WORD + "bar.warp.sync -1; " + across, zeros, 1, threads=64)
    found = run(emulated, WORD + "bar.sync 0; " + across + store("r", 8, 1), zeros, 1, threads=64)
    assert (found[:, 0] == np.arange(64) ^ 32).all()
    with pytest.raises(emulated.KernelError, match="written also by thread 0 of block"):
        run(emulated, "st.global.u32 [%rd6], %r2;", zeros[:32], 1, blocks=2)


# --- what is counted of a launch


def word(lanes_apart, access="ld.shared.u32 %r10, [%r7]"):
    """An access to shared memory, a lane's so many words after that of the lane before."""
    return f"mul.lo.u32 %r6, %r1, {4 * lanes_apart}; add.s32 %r7, %r3, %r6; {access};"


FOUR = f"{{{names('r', 10, 4)}}}"
TRAFFIC = {  # code, words of a lane's row in global memory, kind, bytes wanted, sectors or wavefronts, the fewest
    "coalesced": ("ld.global.u32 %r10, [%rd4];", 1, "global load", 128, 4, 4),
    "bytes": ("ld.global.u8 %r10, [%rd4];", 1, "global load", 32, 4, 1),
    "every other word": ("ld.global.u32 %r10, [%rd4];", 2, "global load", 128, 8, 4),
    "33 words apart": ("ld.global.u32 %r10, [%rd4];", 33, "global load", 128, 32, 4),
    "not at a sector's start": ("ld.global.u32 %r10, [%rd4+4];", 1, "global load", 128, 5, 4),
    "one word for all": ("ld.global.u32 %r10, [%rd1];", 1, "global load", 4, 1, 1),
    "16 bytes": (f"ld.global.v4.u32 {FOUR}, [%rd4];", 4, "global load", 512, 16, 16),
    "half of the lanes": (HALF + "ld.global.u32 %r10, [%rd4]; skip:", 1, "global load", 64, 2, 2),
    "stored": ("st.global.u32 [%rd6], %r1;", 1, "global store", 128, 4, 4),
    "added": ("atom.global.add.u32 %r10, [%rd6], %r1;", 1, "global atomic", 128, 4, 4),
    "shared": (word(1), 1, "shared load", 128, 1, 1),
    "shared, every other word": (word(2), 1, "shared load", 128, 2, 1),
    "shared, 33 words apart": (word(33), 1, "shared load", 128, 1, 1),
    "shared, all in one bank": (word(32), 1, "shared load", 128, 32, 1),
    "shared, one word for all": (word(0), 1, "shared load", 4, 1, 1),
    "shared, generic": (
        "cvt.u64.u32 %rd9, %r5; cvta.shared.u64 %rd10, %rd9; ld.u32 %r10, [%rd10];", 1, "shared load", 128, 1, 1
    ),
    "shared, 8 bytes": (word(2, "ld.shared.v2.u32 {%r10, %r11}, [%r7]"), 1, "shared load", 256, 2, 2),
    "shared, 16 bytes": (word(4, f"ld.shared.v4.u32 {FOUR}, [%r7]"), 1, "shared load", 512, 4, 4),
    "shared, 16 bytes of rows of 128": (word(32, f"ld.shared.v4.u32 {FOUR}, [%r7]"), 1, "shared load", 512, 32, 4),
    "shared, 16 bytes of rows of 144": (word(36, f"ld.shared.v4.u32 {FOUR}, [%r7]"), 1, "shared load", 512, 4, 4),
    "shared, stored": (word(2, "st.shared.u32 [%r7], %r1"), 1, "shared store", 128, 2, 1),
    "shared, added to one word": (word(0, "atom.shared.add.u32 %r10, [%r7], %r1"), 1, "shared atomic", 4, 32, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAFFIC)
def test_requests_are_counted(emulated, name):
    code, words, *wanted = TRAFFIC[name]
    emulated.count_traffic(1)
    try:
        run(emulated, code, np.zeros((33, words)), 1, scratch=4672)
        (launch,) = emulated.take_traffic()
    finally:
        emulated.count_traffic(0)
    (tally,) = launch.places
    assert [tally.kind, tally.bytes, tally.taken, tally.at_least] == wanted
    assert tally.requests == 1
    assert tally.place in code


def test_sectors_of_buffers_are_counted(emulated):
    """Blocks of two warps: all read the same words, one of them in every lane, and write four sectors a warp."""
    code = """
    ld.global.u32 %r10, [%rd4];
    ld.global.u32 %r11, [%rd1];
    mad.lo.u32 %r12, %r2, 64, %r1;
    mul.wide.u32 %rd9, %r12, 4;
    add.s64 %rd10, %rd2, %rd9;
    st.global.u32 [%rd10], %r10;
    """
    for blocks, columns in ((100, 4), (2, 2)):  # of so many blocks, about so many columns are run
        emulated.count_traffic(blocks)
        try:
            run(emulated, code, np.zeros((256, 1)), 4, threads=64, blocks=4)
            (launch,) = emulated.take_traffic()
        finally:
            emulated.count_traffic(0)
        run(emulated, code, np.zeros((256, 1)), 4, threads=64, blocks=4)
        assert emulated.take_traffic() == []
        assert (launch.grid, launch.threads, launch.columns) == ([4, 1, 1], 64, columns)
        assert launch.lanes == 32 * launch.instructions == 64 * columns * launch.longest
        (read,), (written,) = launch.read, launch.written
        found = (read.size, read.requested, read.per_block, read.shared, read.alone)
        assert found == (32, columns * 10, columns * 8, 8, 0)
        found = (written.size, written.requested, written.per_block, written.shared, written.alone)
        assert found == (32, columns * 8, columns * 8, 0, columns * 8)


def reads(module, call):
    """What a call reads, by buffers of each launch."""
    module.count_traffic(1 << 30)
    try:
        call()
        return [launch.read for launch in module.take_traffic()]
    finally:
        module.count_traffic(0)


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
def test_weights_and_keys_are_read_once_in_whole_sectors(emulated, use_ptx, rng, format):
    use_ptx(90)
    emulated.set_order("forward", 0)
    cuda.use_device(emulator.EmulatedDevice(emulated))
    try:
        w, x = cuda.pack([normal(rng, 64, 1024)], format), tensor(normal(rng, 4, 1024), "bf16")
        (product,) = reads(emulated, lambda: cuda.linear(x, w, norm=np.ones(1024, np.float32)))
        (weights,) = [b for b in product if b.size * 32 == w.parts[0].q.nbytes]
        assert weights.requested == weights.per_block == weights.alone == weights.size
        table = cuda.BlockTable()
        table.append(tensor(normal(rng, 1, 2, 1, 128, 256), "bf16"))
        proj, norm, turn = tensor(normal(rng, 1, 10 * 256), "bf16"), np.ones(256, np.float32), np.ones((1, 32))
        options = {"eps": 1e-6, "num_heads": 4, "num_kv_heads": 1, "layer": 0, "cu_seqlens": np.array([0, 1])}
        attend = reads(
            emulated,
            lambda: cuda.gated_attention(
                proj, norm, norm, turn, turn, **options, starts=np.array([127]), tables=[table]
            ),
        )[1]
        (keys,) = [b for b in attend if b.size * 32 == table.blocks[0].nbytes]
        assert keys.requested == keys.per_block == keys.size
    finally:
        emulated.use_ptx("")
        cuda.use_device(None)


# --- kernels that only nvcc compiles so

PRODUCT = (
    '"r"(a[0]), "r"(a[{}]), "r"(a[{}]), "r"(a[3]), "r"(b[0]), "r"(b[1]));\n#elif defined(__CUDACC__)\n    // Turing'
)
SHUFFLED = "__shfl_sync(kAllLanes, high ? a[{}] : a[0], g * 4 + from);\n        const uint32_t a_bottom"
SCRATCH = "    if (lane == 0) scratch[warp] = x;\n{}    float total = 0;"
MUTATIONS = {  # header or source, line, what takes its place, source that sees it, capability, what must be said
    "registers of a product": ("common.cuh", PRODUCT.format(1, 2), PRODUCT.format(2, 1), "linear.cu", 90, "instead of"),
    "table of a lop3": ("gemv_mma.cuh", "%3, 0xEA", "%3, 0xFE", "linear.cu", 90, "not finite"),
    "Turing's shuffles": ("common.cuh", SHUFFLED.format(2), SHUFFLED.format(1), "linear.cu", 75, "instead of"),
    "barrier removed": (
        "common.cuh", SCRATCH.format("    __syncthreads();\n"), SCRATCH.format(""), "norm.cu", 90, "race on shared"
    ),
    "barrier of a warp removed": ("moe.cu", "    __syncwarp();\n", "", "moe.cu", 90, "race on byte .* of device"),
}  # fmt: skip


def use_broken_kernels(emulated, rng, source):
    if source == "linear.cu":
        w, x = cuda.pack([normal(rng, 40, 264)], "int4"), tensor(normal(rng, 3, 264), "bf16")
        assert_close(cuda.linear(x, w), reference.linear(array(x), reference_weight(w)), "bf16")
    elif source == "norm.cu":
        cuda.rms_norm(tensor(normal(rng, 3, 300)), normal(rng, 300), 1e-6)
    else:
        logits, experts, parts = normal(rng, 2, 9), np.zeros((2, 3), np.int64), np.zeros((2, 4), np.float32)
        given = [tensor(x) for x in (logits, experts, parts)]
        emulated.moe_route(given[0].data_ptr(), 8, 3, given[1].data_ptr(), given[2].data_ptr(), 2, 0)


@pytest.mark.skipif(not emulator.nvcc_version(), reason="nvcc is not installed")
@pytest.mark.parametrize("name", MUTATIONS)
def test_broken_kernels_are_caught(emulated, rng, name):
    header, old, new, source, capability, message = MUTATIONS[name]
    emulator.load_ptx(emulated, "broken", capability, source, {f"cuda/{header}": (old, new)})
    emulated.use_ptx("broken")
    emulated.set_order("forward", 0)
    cuda.use_device(emulator.EmulatedDevice(emulated))
    try:
        with pytest.raises((emulated.KernelError, AssertionError), match=message):
            use_broken_kernels(emulated, rng, source)
    finally:
        emulated.use_ptx("")
        cuda.use_device(None)
