"""What the CUDA kernels ask of memory, counted without a card:

    python bench/cuda_traffic.py [words of cases] [--details KERNEL] [--blocks N]

Runs the kernels of a decoded token, of four rows, of a prompt and of a picture at widths of released models on the PTX
machine (csrc/cuda/simt/ptx.h, from what nvcc makes for compute capability 9.0) and prints one line per launch. Numbers
are random, grids are those of the real shape; of a grid of more than N blocks about N are run, and what they ask is
scaled. Columns:

  blocks, warps   of the launch; warps that a multiprocessor of 132 has at once (64 at most) if they spread evenly
  occupancy       of 64 warps, with many blocks, on 9.0 and 8.0, by registers and shared memory as ptxas gives them
  sectors         of global memory that requests touch, over the fewest that hold the bytes they want
  wavefronts      of shared memory, over the fewest for the bytes that are wanted
  must, L2, L1    KB: that the launch reads and writes at all; that blocks take from the L2 cache where their L1 keeps
                  all they read; that warps ask for
  longest         instructions of PTX that the busiest warp executes

`--details KERNEL` lists the instructions of a kernel that waste most. Which time a launch takes follows from none of
this: see bench/results/cuda-traffic.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests" / "cuda"), str(ROOT / "bench")]

import emulator  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from deltaic.model.choice import choice_of  # noqa: E402
from deltaic.ops import cuda  # noqa: E402
from deltaic.ops.layout import new_seen  # noqa: E402
from gpu import random_weight  # noqa: E402

PROCESSORS = 132  # of an H100
SHARED_OF_PROCESSOR = {90: 228 * 1024, 80: 164 * 1024}
Resources = dict[int, dict[str, tuple[int, int]]]  # by capability and kernel: registers, bytes of shared memory


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[], Any]


def occupancy(registers: int, threads: int, shared: int, capability: int) -> int:
    """Warps that a multiprocessor can hold."""
    warps = threads // 32
    in_quarter = 16384 // (-(-registers * 32 // 256) * 256)
    by_shared = SHARED_OF_PROCESSOR[capability] // (-(-(shared + 1024) // 128) * 128)
    return min(64 // warps, 32, 4 * in_quarter // warps, by_shared) * warps


def on_device(x: torch.Tensor) -> torch.Tensor:
    return cuda.device().empty(x.shape, x.dtype).copy_(x)


def weight(rows: int, columns: int, format: str, **options: Any) -> Any:
    w = random_weight(cuda, rows, columns, format, **options)
    parts = [
        cuda.Part(p.format, p.rows, p.columns, p.stride, *(x if x is None else on_device(x) for x in (p.q, p.s, p.d)))
        for p in w.parts
    ]
    return cuda.Weight(parts, w.count, w.glu)


def rows_of(T: int, columns: int) -> torch.Tensor:
    return on_device(torch.randn(T, columns, dtype=torch.bfloat16))


def vector(*shape: int) -> torch.Tensor:
    return on_device(torch.full(shape, 0.5))


def products(T: int, format: str) -> Iterator[Case]:
    """Those of a layer of 0.8B: H = 1024, 16 value heads of 128, 3584 inner."""
    H, values, inner = 1024, 2048, 3584
    x, norm = rows_of(T, H), vector(H)
    name = f"{format} T={T}"
    wide = weight(8224, H, format)
    yield Case(f"linear in {name}", lambda: cuda.linear(x, wide, norm=norm))
    narrow, v = weight(H, values, format), rows_of(T, values)
    yield Case(f"linear out {name}", lambda: cuda.linear(v, narrow, residual=x))
    glu = weight(2 * inner, H, format, glu=True)
    yield Case(f"swiglu {name}", lambda: cuda.swiglu(x, glu, norm=norm))
    down, h = weight(H, inner, format), rows_of(T, inner)
    yield Case(f"linear down {name}", lambda: cuda.linear(h, down, residual=x))


def head() -> Iterator[Case]:
    x, w = rows_of(1, 1024), weight(248320, 1024, "int4")
    w.float_output = True
    yield Case("linear head int4 T=1", lambda: cuda.linear(x, w))


def delta(lengths: list[int], Hv: int, traced: bool = False) -> Iterator[Case]:
    Hk, D, T = 16, 128, sum(lengths)
    C = 2 * Hk * D + Hv * D
    states, convs = ([on_device(torch.zeros(1, *s)) for _ in lengths] for s in ((Hv, D, D), (3, C)))
    trace = vector(1, T, C + Hk * D + Hv * D + Hv) if traced else None
    proj, given = rows_of(T, C + Hv * D + 2 * Hv), [vector(4, C), vector(Hv), vector(Hv), vector(D)]
    cu = np.concatenate([[0], np.cumsum(lengths)])
    name = f"delta rule Hv={Hv} T={'+'.join(map(str, lengths))}" + " verify" * traced
    yield Case(
        name,
        lambda: cuda.gated_delta_net(
            proj, *given, eps=1e-6, num_k_heads=Hk, head_k_dim=D, head_v_dim=D, cu_seqlens=cu,
            conv_states=[c[0] for c in convs], states=[s[0] for s in states],
            trace=trace if trace is None else trace[0],
        ),
    )  # fmt: skip
    if trace is not None:
        yield Case(
            f"commit Hv={Hv} T={T}",
            lambda: cuda.gated_delta_net_commit(
                trace, num_k_heads=Hk, cu_seqlens=cu, counts=np.array(lengths), conv_states=convs, states=states
            ),
        )


def attention(T: int, context: int, Hq: int, Hkv: int = 2) -> Iterator[Case]:
    D, block = 256, 128
    table = cuda.BlockTable()
    for _ in range(-(-context // block)):
        table.append(on_device(torch.ones(1, 2, Hkv, block, D, dtype=torch.bfloat16)))
    proj, cos, norm = rows_of(T, 2 * (Hq + Hkv) * D), vector(T, D // 8), vector(D)
    yield Case(
        f"attention Hq={Hq} T={T} at {context}",
        lambda: cuda.gated_attention(
            proj, norm, norm, cos, cos, eps=1e-6, num_heads=Hq, num_kv_heads=Hkv, layer=0,
            cu_seqlens=np.array([0, T]), starts=np.array([context - T]), tables=[table],
        ),
    )  # fmt: skip


def experts(T: int, format: str, E: int = 256) -> Iterator[Case]:
    """A layer of 35B-A3B: H = 2048, 256 experts of 512, eight of them at a time, and a shared one."""
    H, inner = 2048, 512
    given = {
        "router": weight(E, H, "bf16"),
        "gate_up": weight(2 * inner, H, format, glu=True, count=E),
        "down": weight(H, inner, format, count=E),
        "shared_gate_up": weight(2 * inner, H, format, glu=True),
        "shared_down": weight(H, inner, format),
        "shared_gate": weight(1, H, "bf16"),
    }
    x, norm = rows_of(T, H), vector(H)
    name = f"experts {format} T={T}" + f" of {E}" * (E != 256)
    yield Case(name, lambda: cuda.moe(x, **given, top_k=8, norm=norm, eps=1e-6, residual=x))


def small() -> Iterator[Case]:
    H = 1024
    table, ids = weight(4096, H, "int4"), on_device(torch.arange(4))
    yield Case("embed int4 T=4", lambda: cuda.embed(ids, table))
    a, b, norm = rows_of(4, H), rows_of(4, H), vector(H)
    yield Case("pair of norms T=4", lambda: cuda.rms_norm_pair(a, norm, b, norm, 1e-6))
    choice = choice_of(0.7, 20, 0.8, 0.0, 1.5, 0.0, 1.0, 248320, ())
    seen = on_device(torch.from_numpy(new_seen(248320, np.arange(1000))))
    logits, draws, tokens = on_device(torch.randn(1, 248320)), np.array([1 << 52]), np.zeros(1, np.int64)
    yield Case(
        "sample top_k=20",
        lambda: choice.choose(cuda, logits, draws, tokens, [seen], np.array([0, 1]), np.zeros(1, np.int64)),
    )


def prompt() -> Iterator[Case]:
    """What surrounds the products that cuBLAS computes."""
    T, H, inner = 256, 1024, 3584
    x, norm = rows_of(T, H), vector(H)
    dev = cuda.device()
    yield Case(f"norm T={T}", lambda: cuda.rms_norm(x, norm, 1e-6))
    y, product = rows_of(T, H), rows_of(T, H)
    yield Case(
        f"residual T={T}",
        lambda: dev.module.epilogue(
            product.data_ptr(), 0, 0, x.data_ptr(), y.data_ptr(), T, H, 1, dev.stream()
        ),
    )  # fmt: skip
    pairs, h = rows_of(T, 2 * inner), rows_of(T, inner)
    yield Case(f"glu T={T}", lambda: dev.module.glu(pairs.data_ptr(), h.data_ptr(), T, inner, 1, dev.stream()))
    for format in ("int4", "int8"):
        w, out = weight(2048, H, format), rows_of(2048, H)
        yield Case(
            f"dequantise {format}",
            lambda w=w, out=out: dev.module.dequantise(w.handle, 0, 0, 2048, out.data_ptr(), 1, dev.stream()),
        )


def picture() -> Iterator[Case]:
    """256 patches of 0.8B's tower: 12 heads of 64."""
    side, V, heads = 16, 768, 12
    P = side * side
    image = on_device(torch.zeros(side * 16, side * 16, 3, dtype=torch.uint8))
    patch, bias, positions = weight(V, 768, "bf16"), vector(V), vector(48 * 48, V)
    yield Case(
        f"patches {P}",
        lambda: cuda.patch_embed(
            image, patch, bias, positions, patch_size=16, merge_size=2, mean=(0.5,) * 3, std=(0.5,) * 3
        ),
    )
    qkv, angles, norm = rows_of(P, 3 * V), vector(P, V // heads // 2), vector(V)
    yield Case(
        f"vision attention {P}",
        lambda: cuda.vision_attention(qkv, angles, angles, num_heads=heads, cu_seqlens=np.array([0, P])),
    )
    yield Case(f"layer norm {P}", lambda: cuda.layer_norm(rows_of(P, V), norm, norm, 1e-6))


# In tables of the result page: title, what makes cases.
GROUPS: dict[str, list[Callable[[], Iterator[Case]]]] = {
    "Decoding, 0.8B": [
        *(partial(products, T, format) for format in ("int4", "int8", "bf16") for T in (1, 4)),
        head, partial(delta, [1], 16), partial(delta, [1, 1, 1, 1], 16), partial(delta, [4], 16, True),
        partial(attention, 1, 1024, 8), partial(attention, 1, 8192, 8), partial(attention, 4, 8192, 8), small,
    ],
    "Decoding, 35B-A3B": [
        partial(experts, 1, "int4"), partial(experts, 4, "int4"), partial(experts, 1, "int8", 64),
        partial(experts, 1, "bf16", 64), partial(delta, [1], 32), partial(attention, 1, 8192, 16),
    ],
    "Prompts": [
        prompt, partial(delta, [256], 16), partial(delta, [256], 32), partial(attention, 256, 512, 8),
        partial(experts, 256, "int4"), partial(experts, 256, "bf16", 32), picture,
    ],
}  # fmt: skip


def short_name(mangled: str) -> str:
    """attend_kernel<256, true>"""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.search(r"(\w+_kernel)(<.*>)?\(", plain.replace("deltaic::cuda::", "").replace("deltaic::", ""))
    if name is None:
        return mangled
    formats = ("f32", "bf16", "int8", "int4")
    arguments = re.sub(r"\(\w*:*Format\)(\d)", lambda m: formats[int(m[1])], name[2] or "")
    return name[1].removesuffix("_kernel") + arguments


def ratio(taken: float, least: float) -> str:
    return f"{taken / least:.2f}" if least else ""


def kilobytes(sectors: float) -> str:
    return f"{sectors * 32 / 1024:,.0f}" if sectors * 32 >= 10240 else f"{sectors * 32 / 1024:.1f}"


def line(case: Case, launch: Any, resources: Resources) -> str:
    blocks, scale = int(np.prod(launch.grid)), launch.grid[0] / launch.columns
    warps = launch.threads // 32
    registers = resources[90][launch.kernel][0]
    most = {
        c: occupancy(found[launch.kernel][0], launch.threads, launch.shared_bytes, c) for c, found in resources.items()
    }
    at_once = min(most[90], blocks * warps / PROCESSORS)
    of = lambda kind, what: sum(getattr(p, what) for p in launch.places if p.kind.startswith(kind))  # noqa: E731
    both = [*launch.read, *launch.written]
    must = sum(b.shared + b.alone * scale for b in both)
    return (
        f"| {case.name} | {short_name(launch.kernel)} | {blocks} | {at_once:.1f} | {registers} "
        f"| {launch.shared_bytes / 1024:.1f} | {most[90]}/{most[80]} "
        f"| {ratio(of('global', 'taken'), of('global', 'at_least'))} "
        f"| {ratio(of('shared', 'taken'), of('shared', 'at_least'))} "
        f"| {kilobytes(must)} | {ratio(sum(b.per_block for b in both) * scale, must)} "
        f"| {ratio(sum(b.requested for b in both) * scale, must)} | {launch.longest:,} |"
    )


HEADER = (
    "| case | kernel | blocks | warps | registers | shared KB | occupancy | sectors | wavefronts | must KB "
    "| L2 / must | L1 / must | longest |\n" + "| --- | --- |" + " ---: |" * 11
)


def details(case: Case, launch: Any) -> None:
    print(f"\n{case.name}: {short_name(launch.kernel)}, {launch.lanes / launch.instructions:.1f} lanes active")
    for p in sorted(launch.places, key=lambda p: p.at_least - p.taken)[:25]:
        print(f"{p.taken:10} instead of {p.at_least:9} in {p.requests:8}: {p.kind}, {p.place}")
    for kind, buffers in (("read", launch.read), ("written", launch.written)):
        for b in buffers:
            once = b.shared + b.alone
            print(f"{b.requested:10} sectors {kind}, {b.per_block} by blocks, {once} once: {b.name}")


def tables(module: Any, words: list[str], resources: Resources, blocks: int, wanted: str | None = None) -> None:
    """Prints what the cases that hold one of `words` ask for, on a device that runs PTX."""
    for title, makers in GROUPS.items():
        print(f"\n## {title}\n\n{HEADER}")
        for case in (case for make in makers for case in make()):
            if words and not any(word in case.name for word in words):
                continue
            module.count_traffic(blocks)
            try:
                case.call()
                launches = module.take_traffic()
            finally:
                module.count_traffic(0)
            for launch in launches:
                print(line(case, launch, resources), flush=True)
                if wanted and wanted in short_name(launch.kernel):
                    details(case, launch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only cases that hold one of these")
    parser.add_argument("--details", help="of kernels that hold this")
    parser.add_argument("--blocks", type=int, default=128, help="about so many of a launch are run")
    args = parser.parse_args()
    module = emulator.build()
    emulator.load_ptx(module, "90", 90)
    module.use_ptx("90")
    module.set_order("forward", 0)
    cuda.use_device(emulator.EmulatedDevice(module))
    torch.manual_seed(0)
    resources = {capability: emulator.kernel_resources(capability) for capability in SHARED_OF_PROCESSOR}
    tables(module, args.words, resources, args.blocks, args.details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
