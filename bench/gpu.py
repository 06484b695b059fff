"""Everything there is to know about one GPU, in one command and under ten minutes:

    python bench/gpu.py [--report FILE] [--sizes 0.8B 2B ...] [--skip build tests sanitizer operators models]

Builds the CUDA extension for the card of this machine, runs every kernel and model test on it, runs the kernel tests
under compute-sanitizer, measures every operator of a decoded token against the measured copy bandwidth, and decodes and
prefills whole models of the released shapes with random weights, against the copy bandwidth and the measured matrix
peak. Writes one Markdown report that starts with the card's name, line by line
as it comes: a step that fails says so in it, and the next one runs. Steps that do not fit into the time that is left
are reported as left out, never silently. The step "overlap" runs the tests and the smallest model again with
DELTAIC_PDL=1: the blocks of a kernel may start while the kernel before still runs (compute capability 9.0 and newer).

`--rehearse` runs the measuring steps on the emulator with tiny shapes: the figures mean nothing, the script is tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "tests" / "cuda")]
DRAFTS = 3  # of a round
STEPS = ("build", "tests", "operators", "models", "overlap", "sanitizer")
EXTENSION = "- extension:"  # what comes before it in a report says where it was made
ON_CARD = "[gpu or -gpu"  # of the tests that run in several places, those on the card
# Of the kernels alone: what captures graphs needs the caching allocator, which would hide errors from the sanitizer.
KERNEL_TESTS = [f"tests/cuda/test_{name}.py" for name in ("dense", "mixers", "verify", "experts_vision_sampling")]


@dataclass(frozen=True)
class Size:
    hidden: int
    delta_layers: int
    attention_layers: int
    inner: int
    heads: int
    kv_heads: int
    value_heads: int
    tied: bool
    key_heads: int = 16
    width: int = 128
    head_dim: int = 256
    vocab: int = 248320


SIZES = {
    "0.8B": Size(1024, 18, 6, 3584, 8, 2, 16, True),
    "2B": Size(2048, 18, 6, 6144, 8, 2, 16, True),
    "4B": Size(2560, 24, 8, 9216, 16, 4, 32, True),
    "9B": Size(4096, 24, 8, 12288, 16, 4, 32, False),
}
TINY = Size(32, 3, 1, 48, 2, 1, 2, True, key_heads=1, width=16, head_dim=32, vocab=64)


class Report:
    """Markdown lines, printed and written to the file as they come."""

    def __init__(self, budget: float, file: Path | None = None):
        self.lines: list[str] = []
        self.end = time.monotonic() + budget
        self.file = file

    def add(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("\n".join(self.lines) + "\n")

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def failed(self) -> bool:
        return any("FAILED" in line or "NOT FINISHED" in line for line in self.lines)

    def step(self, name: str, call: Callable[[], Any]) -> bool:
        """Run a step; what it raises goes into the report. Whether it came through and did not return False."""
        try:
            return call() is not False
        except Exception:
            self.add(f"\n- {name}: FAILED\n\n```\n{traceback.format_exc()[-3000:].strip()}\n```\n")
            return False

    def command(self, title: str, command: list[str], limit: float, lines: int = 1, **environment: str) -> bool:
        """Run a command within the time left; its last lines, more where it fails, go into the report."""
        limit = min(limit, self.left)
        if limit < 5:
            self.add(f"- {title}: LEFT OUT, no time left")
            return False
        start = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            said = process.communicate(timeout=limit)[0]
            code = process.returncode
            verdict = "ok" if code == 0 else f"FAILED (exit code {code})"
        except subprocess.TimeoutExpired:  # with all that it started: compilers, or a program under the sanitizer
            os.killpg(process.pid, signal.SIGKILL)
            said, code = process.communicate()[0], None
            verdict = "NOT FINISHED"
        tail = "\n".join(said.strip().splitlines()[-(lines if code == 0 else 25) :])
        self.add(f"- {title}: {verdict}, {time.monotonic() - start:.0f} s")
        self.add(f"\n```\n{tail}\n```\n")
        return code == 0


def failure(error: Exception) -> str:
    """An error in a cell of a table."""
    return f"FAILED: {type(error).__name__}: {str(error)[:200]!r}".replace("|", "/")


def last_line(command: list[str]) -> str:
    """The last line that a command prints, or why there is none."""
    try:
        lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.splitlines()
        return lines[-1] if lines else f"{command[0]} says nothing"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"


def build(report: Report) -> bool:
    """The extension for this card, into the source tree."""
    import pybind11
    import torch

    major, minor = torch.cuda.get_device_capability()
    folder = "build/gpu"
    beside = os.pathsep.join([os.environ["PATH"], str(Path(sys.executable).parent)])  # as pip puts it there
    cmake = shutil.which("cmake", path=beside) or "cmake"
    ninja = shutil.which("ninja", path=beside)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure = [
        cmake, "-S", ".", "-B", folder, *generator, "-DDELTAIC_CUDA=ON", f"-DDELTAIC_CUDA_ARCHS={major}{minor}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'python' / 'deltaic'}",
    ]  # fmt: skip
    return report.command("configure", configure, 120) and report.command(
        "build", [cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)], 400
    )


def search_path() -> str:
    """For Python: this tree, and then what it was told to search, as that may hold what the tests import."""
    return os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])


def run_tests(report: Report, **environment: str) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "tests/cuda", "-k", ON_CARD, "-p", "no:cacheprovider"]
    title = " ".join(["kernel and model tests on the card", *(f"{k}={v}" for k, v in environment.items())])
    return report.command(title, command, 150, PYTHONPATH=search_path(), **environment)


def run_measured(report: Report, step: str, sizes: Sequence[str], limit: float, **environment: str) -> bool:
    """A step of measuring in a process of its own, as a kernel that faults or hangs takes the rest of its process with
    it. What it has written by then goes into the report."""
    file = ROOT / "build" / f"gpu-{step}.md"
    file.unlink(missing_ok=True)
    seconds = min(limit, report.left) - 5  # it says itself what it has left out
    command = [sys.executable, "bench/gpu.py", "--report", str(file), "--seconds", f"{seconds:.0f}", "--sizes", *sizes]
    skipped = [other for other in STEPS if other != step]
    title = " ".join([step, *(f"{k}={v}" for k, v in environment.items())])
    done = report.command(title, [*command, "--skip", *skipped], limit, **environment)
    lines = file.read_text().splitlines() if file.exists() else []
    begin = next((i + 1 for i, line in enumerate(lines) if line.startswith(EXTENSION)), 0)
    for line in lines[begin:]:
        report.add(line)
    return done


def run_overlapped(report: Report) -> bool:
    passed = run_tests(report, DELTAIC_PDL="1")
    return run_measured(report, "models", ["0.8B"], 100, DELTAIC_PDL="1") and passed


def run_sanitizer(report: Report) -> None:
    toolkits = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ["PATH"], *(f"{toolkit}/bin" for toolkit in toolkits if toolkit)])
    tool = shutil.which("compute-sanitizer", path=path)
    if tool is None:
        report.add("- compute-sanitizer: LEFT OUT, not installed")
        return
    tests = ["-m", "pytest", "-q", *KERNEL_TESTS, "-k", ON_CARD, "-p", "no:cacheprovider"]
    checks = ("memcheck", "racecheck", "initcheck", "synccheck")
    for i, check in enumerate(checks):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, *tests]
        environment = {"PYTHONPATH": search_path(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        report.command(f"compute-sanitizer {check}", command, report.left / (len(checks) - i), **environment)


# ------------------------------------------------------------------------------------------------------------ measuring


class Meter:
    """Times calls: on a GPU the median of replays of a captured graph, on the emulator one plain call."""

    def __init__(self, emulated: bool):
        self.emulated = emulated

    def copies(self, nbytes: float) -> int:
        """How many weights of this size to take in turn, so that none is found in the cache of the card."""
        if self.emulated:
            return 1
        import torch

        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return max(2, min(32, math.ceil(3 * cache / nbytes)))

    def seconds(self, *calls: Callable[[], Any], repeats: int = 20, capture: bool = True) -> float:
        """Of one call, when all of them run one after another: a graph takes some microseconds to begin."""
        import torch

        if self.emulated:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        def all_calls() -> None:
            for call in calls:
                call()

        run, stream = all_calls, torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # uploads what the call needs, so that the graph below holds kernels only
            all_calls()
        torch.cuda.synchronize()
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                all_calls()
            run = graph.replay
        times = []
        for _ in range(repeats):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            run()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        return sorted(times)[len(times) // 2] / len(calls)


def peaks(meter: Meter, ops: Any) -> tuple[float, float]:
    """Bytes per second of copying (read and written), and flops per second of a bfloat16 product through cuBLAS."""
    import torch

    n = 1 << (12 if meter.emulated else 28)
    source = ops.zeros([n], "float32")
    target = ops.zeros([n], "float32")
    copy = 8 * n / meter.seconds(lambda: target.copy_(source))
    side = 64 if meter.emulated else 8192
    a = torch.randn(side, side, device=ops.device().torch_device, dtype=torch.bfloat16)  # zeros would cost less power
    return copy, 2 * side**3 / meter.seconds(lambda: torch.matmul(a, a))


def random_weight(ops: Any, rows: int, columns: int, format: str, *, glu: bool = False, count: int = 1) -> Any:
    """A weight of random bytes made on the device: what a product costs does not depend on the numbers."""
    import torch

    dev = ops.device()
    quantised = format in ("int8", "int4")
    multiple = 128 if quantised else 8
    stride = -(-columns // multiple) * multiple
    where = dev.torch_device
    all_rows = rows * count
    if not quantised:
        kind = torch.float32 if format == "f32" else torch.bfloat16
        q = torch.randn(all_rows, stride, device=where, dtype=kind) * 0.02
        return ops.Weight([ops.Part(format, rows, columns, stride, q)], count, glu)
    width = stride if format == "int8" else stride // 2
    q = torch.randint(0, 256, (all_rows, width), device=where, dtype=torch.uint8)
    s = torch.randint(0, 256, (all_rows, stride // 32), device=where, dtype=torch.uint8) if format == "int4" else None
    d = torch.full((all_rows, stride // 128), 0x0C00, device=where, dtype=torch.int16)  # 2^-12 as a half
    return ops.Weight([ops.Part(format, rows, columns, stride, q, s, d)], count, glu)


def random_model(ops: Any, size: Size, format: str) -> tuple[Any, Any]:
    """A TextModel of the given shape, and its MtpModel."""
    import numpy as np
    from deltaic.model.config import RopeConfig, TextConfig
    from deltaic.model.mtp import MtpModel
    from deltaic.model.text import TextModel
    from deltaic.model.weights import AttentionMixer, DeltaMixer, DenseFFN, Layer, MtpWeights, TextWeights

    s, rng = size, np.random.default_rng(0)
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * s.attention_layers
    values = {
        "vocab_size": s.vocab, "hidden_size": s.hidden, "num_hidden_layers": len(kinds), "layer_types": tuple(kinds),
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim,
        "linear_num_key_heads": s.key_heads, "linear_num_value_heads": s.value_heads, "linear_key_head_dim": s.width,
        "linear_value_head_dim": s.width, "linear_conv_kernel_dim": 4, "intermediate_size": s.inner, "num_experts": 0,
        "num_experts_per_tok": 0, "moe_intermediate_size": 0, "shared_expert_intermediate_size": 0,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": s.tied,
        "mtp_num_hidden_layers": 1,
        "rope": RopeConfig(1e7, s.head_dim // 4, (11, 11, 10), "default", 1.0, 32768, None),
    }  # fmt: skip
    config = TextConfig(**values)

    def vector(*shape: int) -> Any:
        return (rng.normal(size=shape) * 0.02).astype(np.float32)

    def weight(rows: int, columns: int, glu: bool = False) -> Any:
        return random_weight(ops, rows, columns, format, glu=glu)

    C, values_width = config.conv_dim, s.value_heads * s.width

    def layer(kind: str) -> Layer:
        if kind == "linear_attention":
            mixer: Any = DeltaMixer(
                weight(C + values_width + 2 * s.value_heads, s.hidden), vector(4, C), vector(s.value_heads),
                vector(s.value_heads), vector(s.width) + 1, weight(s.hidden, values_width),
            )  # fmt: skip
        else:
            mixer = AttentionMixer(
                weight(2 * (s.heads + s.kv_heads) * s.head_dim, s.hidden), vector(s.head_dim), vector(s.head_dim),
                weight(s.hidden, s.heads * s.head_dim),
            )  # fmt: skip
        ffn = DenseFFN(weight(2 * s.inner, s.hidden, glu=True), weight(s.hidden, s.inner))
        return Layer(vector(s.hidden), mixer, vector(s.hidden), ffn)

    layers, embed = [layer(kind) for kind in kinds], weight(s.vocab, s.hidden)
    weights = TextWeights(embed, layers, vector(s.hidden), embed if s.tied else weight(s.vocab, s.hidden))
    drafting = MtpWeights(
        vector(s.hidden), vector(s.hidden), weight(s.hidden, 2 * s.hidden), layer("full_attention"), vector(s.hidden)
    )
    text = TextModel(config, ops.place(weights, format), ops)
    return text, MtpModel(text, ops.place(drafting, format))


def measure_operators(report: Report, meter: Meter, ops: Any, size: Size, formats: tuple[str, ...]) -> None:
    """Every operator of a decoded token, a prompt and a picture. Bytes are those that must be read and written."""
    import numpy as np
    import torch
    from deltaic.model.choice import choice_of
    from deltaic.ops.layout import new_seen

    copy, peak = peaks(meter, ops)
    report.add(f"\nCopying reaches {copy / 1e9:.0f} GB/s, a bfloat16 product {peak / 1e12:.0f} TFLOP/s.\n")
    report.add("| operator | shape | format | µs | GB/s | of copying | TFLOP/s | of matrix peak |")
    report.add("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    s = size
    many = 24 if meter.emulated else 512

    def row(name: str, shape: str, format: str, nbytes: float, flops: float, *calls: Any) -> None:
        if report.left < 10:
            report.add(f"| {name} | {shape} | {format} | LEFT OUT, no time left | | | | |")
            return
        try:
            seconds = meter.seconds(*(calls if len(calls) > 1 or meter.emulated else calls * 8))
        except Exception as error:
            report.add(
                f"| {name} | {shape} | {format} | FAILED: {type(error).__name__}: {str(error)[:200]!r} | | | | |"
            )
            return
        report.add(
            f"| {name} | {shape} | {format} | {seconds * 1e6:.1f} | {nbytes / seconds / 1e9:.0f} "
            f"| {nbytes / seconds / copy:.2f} | {flops / seconds / 1e12:.1f} | {flops / seconds / peak:.2f} |"
        )

    def rows_of(T: int, columns: int) -> Any:
        return torch.randn(T, columns, device=ops.device().torch_device, dtype=torch.bfloat16)

    def vector(*shape: int) -> Any:
        return ops.upload(np.full(shape, 0.5, np.float32))

    def product(name: str, T: int, rows: int, columns: int, format: str, call: Any, glu: bool = False) -> None:
        """call(w, x): of a weight [rows, columns] and T rows; several weights in turn."""
        one = random_weight(ops, rows, columns, format, glu=glu)
        weights = [one] + [
            random_weight(ops, rows, columns, format, glu=glu) for _ in range(meter.copies(one.nbytes) - 1)
        ]
        x = rows_of(T, columns)
        flops = 2.0 * T * rows * columns
        row(name, f"{T}x{columns}x{rows}", format, one.nbytes, flops, *(partial(call, w, x) for w in weights))

    norm = vector(s.hidden)
    delta_rows = 2 * s.key_heads * s.width + 2 * s.value_heads * s.width + 2 * s.value_heads
    for format in formats:
        for T in (1, 4, many):
            residual = rows_of(T, s.hidden)
            product("linear (in)", T, delta_rows, s.hidden, format, lambda w, x: ops.linear(x, w, norm=norm))
            product(
                "linear (out)", T, s.hidden, s.value_heads * s.width, format,
                lambda w, x, r=residual: ops.linear(x, w, residual=r),
            )  # fmt: skip
            product("swiglu", T, 2 * s.inner, s.hidden, format, lambda w, x: ops.swiglu(x, w, norm=norm), glu=True)
            product(
                "linear (down)", T, s.hidden, s.inner, format, lambda w, x, r=residual: ops.linear(x, w, residual=r)
            )
        product("linear (head)", 1, s.vocab, s.hidden, format, lambda w, x: ops.linear(x, w))
    x = rows_of(many, s.hidden)
    nbytes = 2.0 * x.numel() * x.element_size()
    row("rms_norm", f"{many}x{s.hidden}", "bf16", nbytes, 0, lambda: ops.rms_norm(x, norm, 1e-6))
    row("layer_norm", f"{many}x{s.hidden}", "bf16", nbytes, 0, lambda: ops.layer_norm(x, norm, norm, 1e-6))

    C, Hv, D = 2 * s.key_heads * s.width + s.value_heads * s.width, s.value_heads, s.width
    state, conv = ops.zeros([Hv, D, D], "float32"), ops.zeros([3, C], "float32")
    vectors = [vector(4, C), vector(Hv), vector(Hv), vector(D)]
    for T, traced in ((1, False), (4, True), (many, False)):
        proj = rows_of(T, C + Hv * D + 2 * Hv)
        trace = ops.zeros([T, C + s.key_heads * D + Hv * D + Hv], "float32") if traced else None
        call = lambda p=proj, T=T, trace=trace: ops.gated_delta_net(  # noqa: E731
            p, *vectors, eps=1e-6, num_k_heads=s.key_heads, head_k_dim=D, head_v_dim=D, cu_seqlens=np.array([0, T]),
            conv_states=[conv], states=[state], trace=trace,
        )  # fmt: skip
        nbytes = 2 * Hv * D * D * 4 + 2 * proj.numel()
        row("gated_delta_net" + " (verify)" * traced, f"T={T}", "bf16", nbytes, 6.0 * T * Hv * D * D, call)

    context, block = (64, 64) if meter.emulated else (8192, 128)
    table = ops.BlockTable()
    for _ in range(context // block):
        table.append(ops.zeros([1, 2, s.kv_heads, block, s.head_dim], "uint16"))
    head_norm = vector(s.head_dim)
    for T in (1, 4, many):
        if context < T:
            continue
        proj, cos = rows_of(T, 2 * (s.heads + s.kv_heads) * s.head_dim), vector(T, s.head_dim // 8)
        call = lambda proj=proj, cos=cos, T=T: ops.gated_attention(  # noqa: E731
            proj, head_norm, head_norm, cos, cos, eps=1e-6, num_heads=s.heads, num_kv_heads=s.kv_heads, layer=0,
            cu_seqlens=np.array([0, T]), starts=np.array([context - T]), tables=[table],
        )  # fmt: skip
        nbytes, flops = 4.0 * s.kv_heads * s.head_dim * context, 4.0 * T * s.heads * s.head_dim * context
        row("gated_attention", f"{T} at {context}", "bf16", nbytes, flops, call)

    E, inner, top_k = (8, 16, 2) if meter.emulated else (128, 512, 8)
    for T in (1, many):
        x = rows_of(T, s.hidden)
        experts = {
            "router": random_weight(ops, E, s.hidden, "bf16"),
            "gate_up": random_weight(ops, 2 * inner, s.hidden, "bf16", glu=True, count=E),
            "down": random_weight(ops, s.hidden, inner, "bf16", count=E),
            "shared_gate_up": random_weight(ops, 2 * inner, s.hidden, "bf16", glu=True),
            "shared_down": random_weight(ops, s.hidden, inner, "bf16"),
            "shared_gate": random_weight(ops, 1, s.hidden, "bf16"),
        }
        used = min(E, T * top_k) + 1  # expert matrices that are read, if the routes spread
        call = lambda x=x, w=experts: ops.moe(x, **w, top_k=top_k, norm=norm, eps=1e-6, residual=x)  # noqa: E731
        nbytes, flops = 6.0 * inner * s.hidden * used, 6.0 * T * (top_k + 1) * inner * s.hidden
        row("moe", f"{T}, {top_k} of {E}", "bf16", nbytes, flops, call)

    side, V, heads = (4, 32, 2) if meter.emulated else (48, 1024, 16)
    P = side * side
    image = torch.zeros(side * 16, side * 16, 3, dtype=torch.uint8, device=ops.device().torch_device)
    patch = random_weight(ops, V, 3 * 16 * 16, "bf16")
    call = lambda: ops.patch_embed(  # noqa: E731
        image, patch, vector_of_patches, positions, patch_size=16, merge_size=2, mean=(0.5,) * 3, std=(0.5,) * 3
    )  # fmt: skip
    vector_of_patches, positions = vector(V), vector(side * side, V)
    row("patch_embed", f"{P} patches", "bf16", 3.0 * 256 * P + 6.0 * P * V, 2.0 * P * V * 768, call)
    qkv, angles = rows_of(P, 3 * V), vector(P, V // heads // 2)
    call = lambda: ops.vision_attention(  # noqa: E731
        qkv, angles, angles, num_heads=heads, cu_seqlens=np.array([0, P])
    )  # fmt: skip
    row("vision_attention", f"{P} patches", "bf16", 8.0 * P * V, 4.0 * P * P * V, call)

    draws, tokens = ops.upload(np.full(4, 2**52)), ops.upload(np.zeros(4, np.int64))
    seen = ops.upload(new_seen(s.vocab, np.arange(min(1000, s.vocab))))
    for T, k in ((1, 20), (4, 20), (1, 0)):
        logits = ops.upload(np.random.default_rng(0).normal(size=(T, s.vocab)).astype(np.float32))
        choice = choice_of(0.7, k, 0.8, 0.0, 1.5, 0.0, 1.0, s.vocab, ())
        call = lambda T=T, choice=choice, logits=logits: choice.choose(  # noqa: E731
            ops, logits, draws[:T], tokens[:T], [seen], np.array([0, T]), np.zeros(T, np.int64)
        )  # fmt: skip
        row("sample_rows", f"{T}, top_k={k}", "f32", 4.0 * T * s.vocab, 0, call)


def measure_models(report: Report, meter: Meter, ops: Any, sizes: dict[str, Size], formats: tuple[str, ...]) -> None:
    import torch

    copy, peak = peaks(meter, ops)
    prompt, chunk, steps = (40, 20, 2) if meter.emulated else (2048, 512, 128)
    report.add(
        "\n| model | format | GB | decode tok/s | µs of a step | of which its graph | bytes/s of copying "
        f"| µs of a round of {DRAFTS} drafts | of which its graph | prefill tok/s (2048) | of matrix peak |"
    )
    report.add("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, size in sizes.items():
        for format in formats:
            if report.left < 20:
                report.add(f"| {name} | {format} | LEFT OUT, no time left | | | | | | | | |")
                continue
            try:
                measure_model(report, meter, ops, name, size, format, (copy, peak), (prompt, chunk, steps))
            except (torch.cuda.OutOfMemoryError, MemoryError) as error:
                report.add(f"| {name} | {format} | does not fit: {str(error).splitlines()[0][:80]} | | | | | | | | |")
            except Exception as error:
                report.add(f"| {name} | {format} | {failure(error)} | | | | | | | | |")
            if not meter.emulated:
                torch.cuda.empty_cache()


def measure_model(
    report: Report, meter: Meter, ops: Any, name: str, size: Size, format: str, peaks: tuple[float, float],
    lengths: tuple[int, int, int],
) -> None:  # fmt: skip
    """One line: decoding and rounds of drafts with the tokens read back every time, and a prompt in chunks."""
    import numpy as np
    from deltaic.model.choice import Choosing, Seen, choice_of
    from deltaic.model.state import State
    from deltaic.model.weights import weight_bytes
    from deltaic.ops.layout import new_seen

    (copy, peak), (prompt, chunk, steps) = peaks, lengths
    text, mtp = random_model(ops, size, format)
    nbytes = weight_bytes(text.weights) - (0 if size.tied else text.weights.embed.nbytes)
    state = State(text.config, ops, "bf16", mtp=True)
    prefill_seconds = meter.seconds(partial(prefill, text, state, prompt, chunk), repeats=3, capture=False)
    choice = choice_of(0.7, 20, 0.8, 0.0, 1.5, 0.0, 1.0, size.vocab, ())  # of the model cards
    seen = Seen(ops.upload(new_seen(size.vocab, np.empty(0, np.int64))))
    c = text.config
    traces = [ops.zeros([c.num_delta_layers, 1 + DRAFTS, c.delta_trace_width], np.float32) for _ in range(2)]
    kept: list[Any] = []
    hidden, token, bounds, counts = None, 1, np.array([0, 1 + DRAFTS]), np.array([1])

    def choosing(rows: int) -> Choosing:
        seen.said = [token]
        return Choosing(choice, np.full(rows, 2**52), [seen])

    def step() -> None:
        nonlocal hidden, token
        hidden, _, (token,) = text.step([[token]], [state], choosing=choosing(1))

    def draft() -> None:
        """A round of which one token was accepted, as in every round before."""
        nonlocal hidden, token
        kept[:] = [hidden]  # the graph is replayed once more
        first = state.length - 1  # of what the round before has given, one row counts
        owed = (bounds, counts, traces[1]) if hidden is not None and len(hidden) > 1 else None
        _, hidden, _, (token, *_) = mtp.draft_at_once(
            hidden[:1], [token], state, first, choosing(1 + DRAFTS), DRAFTS, traces[0], owed, chooses=True
        )
        text.count([state], [1])
        traces.reverse()

    step_seconds, step_graph = in_turns(meter, text, step, steps)
    round_seconds, round_graph = in_turns(meter, text, draft, steps)
    parameters = sum(w.shape[0] * w.shape[1] for w in matrices(text.weights))
    flops = 2 * parameters * prompt / prefill_seconds
    report.add(
        f"| {name} | {format} | {nbytes / 1e9:.2f} | {1 / step_seconds:.1f} | {step_seconds * 1e6:.0f} "
        f"| {step_graph * 1e6:.0f} | {nbytes / step_seconds / copy:.2f} "
        f"| {round_seconds * 1e6:.0f} | {round_graph * 1e6:.0f} "
        f"| {prompt / prefill_seconds:.0f} | {flops / peak:.2f} |"
    )


def in_turns(meter: Meter, text: Any, call: Callable[[], Any], times: int) -> tuple[float, float]:
    """Seconds of one of so many calls, and of the graph that the last one has replayed, by itself."""
    for _ in range(3):  # graphs are made
        call()
    start = time.perf_counter()
    for _ in range(times):
        call()
    seconds = (time.perf_counter() - start) / times
    tape = next(reversed(text.replay._tapes.values()))
    return seconds, meter.seconds(tape._graph.replay, capture=False)


def prefill(text: Any, state: Any, prompt: int, chunk: int) -> Any:
    """Feed a prompt from the start, in chunks, and return the logits after it."""
    import numpy as np

    state.length = 0
    for first in range(0, prompt, chunk):
        places = np.arange(first, first + chunk)
        x = text.embed(places % text.config.vocab_size)
        hidden = text.forward(x, np.repeat(places[:, None], 3, axis=1), [state], np.array([0, chunk]))
    return text.logits(hidden[-1:])


def matrices(weights: Any) -> list[Any]:
    """The matrices that every token of a prompt is multiplied with."""
    found = []
    for layer in weights.layers:
        parts = [getattr(layer.mixer, n, None) for n in ("in_proj", "out_proj", "qkv_proj", "o_proj")]
        found += [w for w in [*parts, layer.ffn.gate_up, layer.ffn.down] if w is not None]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, help="default: build/gpu-<card>.md")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--skip", nargs="*", choices=STEPS, default=[])
    parser.add_argument("--seconds", type=float, default=570, help="time for everything")
    parser.add_argument("--rehearse", action="store_true", help="measure on the emulator with tiny shapes")
    args = parser.parse_args()
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print("bench/gpu.py: torch finds no NVIDIA GPU; --rehearse runs on the emulator", file=sys.stderr)
        return 2
    card = "emulator (rehearsal: the figures mean nothing)" if args.rehearse else torch.cuda.get_device_name()
    file = args.report or ROOT / "build" / f"gpu-{card.split(' (')[0].replace(' ', '-')}.md"
    report = Report(args.seconds, file)
    report.add(f"# deltaic on {card}\n")
    report.add(f"torch {torch.__version__}, CUDA {torch.version.cuda}; {last_line(['git', 'rev-parse', 'HEAD'])}\n")
    report.add(last_line(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit", "--format=csv"]))
    wanted = [step for step in STEPS if step not in args.skip]
    if args.rehearse:
        import emulator
        from deltaic.ops import cuda

        cuda.use_device(emulator.EmulatedDevice(emulator.build()))
        wanted = [step for step in wanted if step in ("operators", "models")]
    if "build" in wanted:
        report.step("build", partial(build, report))
    importlib.invalidate_caches()
    extension = importlib.util.find_spec("deltaic._cuda")
    if extension is not None:
        report.add(f"{EXTENSION} {extension.origin}")  # an installed package may come before this tree
    elif not args.rehearse:
        report.add("- the rest: FAILED, as there are no kernels to run")
        wanted = []
    if "tests" in wanted:
        report.step("tests", partial(run_tests, report))
    alone = args.rehearse or len(wanted) == 1
    meter = Meter(args.rehearse)
    formats = ("bf16", "int4") if args.rehearse else ("bf16", "int8", "int4")
    if "operators" in wanted and not alone:
        report.step("operators", partial(run_measured, report, "operators", args.sizes, 150))
    elif "operators" in wanted:
        size = TINY if args.rehearse else SIZES["4B"]
        report.step("operators", lambda: measure_operators(report, meter, op_set(), size, formats))
    if "models" in wanted and not alone:
        report.step("models", partial(run_measured, report, "models", args.sizes, 250))
    elif "models" in wanted:
        sizes = {"tiny": TINY} if args.rehearse else {name: SIZES[name] for name in args.sizes}
        report.step("models", lambda: measure_models(report, meter, op_set(), sizes, formats))
    if "overlap" in wanted and torch.cuda.get_device_capability() >= (9, 0):
        report.step("overlap", partial(run_overlapped, report))
    if "sanitizer" in wanted:  # last: it takes what time is left
        report.step("sanitizer", partial(run_sanitizer, report))
    print(f"\nWritten to {file}")
    return 1 if report.failed else 0


def op_set() -> Any:
    from deltaic.ops import cuda

    return cuda


if __name__ == "__main__":
    sys.exit(main())
