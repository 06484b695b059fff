"""`deltaic bench`: what it counts, and that its result is whole. How fast anything is, is not tested."""

from __future__ import annotations

import json

import deltaic
import numpy as np
import pytest
from deltaic import benchmark, cli
from deltaic.errors import ArgumentError, ContextLengthError
from deltaic.machine import resident_bytes


def test_measure(monkeypatch, tiny_folder, device):
    monkeypatch.setattr(benchmark, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(benchmark, "_PEAK_SECONDS", 1e-4)
    facts = benchmark.measure(
        lambda: deltaic.load(tiny_folder, device=device, dtype="bf16"), prompt=20, new=5, repeat=2
    )
    json.dumps(facts)
    for name in ("load_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "latency_p50_ms"):
        assert facts[name] > 0
    percentiles = [facts[f"latency_{name}_ms"] for name in ("p50", "p90", "p99", "max")]
    assert percentiles == sorted(percentiles)
    assert 0 <= facts["disturbed_tokens"] <= 2 * 4
    assert facts["dtype"] == "bf16"
    assert (facts["prompt_tokens"], facts["new_tokens"], facts["repeat"]) == (20, 5, 2)
    if device == "cpu":
        assert facts["read_bandwidth"] > 1e8
        assert facts["peak_f32"] > 1e8
        expected = facts["bytes_read_per_token"] * facts["decode_tokens_per_second"] / facts["read_bandwidth"]
        assert facts["decode_bandwidth_fraction"] == pytest.approx(expected)
    else:
        assert facts["read_bandwidth"] is facts["decode_bandwidth_fraction"] is facts["peak_int8"] is None
    table = benchmark.as_table(facts)
    assert f"decode     {facts['decode_tokens_per_second']:.1f} tokens/s" in table or "decode" in table
    assert ("GB/s" in table) == (device == "cpu")


def test_traffic_is_what_the_weights_take(tiny_folder):
    model = deltaic.load(tiny_folder, device="reference", dtype="bf16")
    c = model.config.text
    traffic = benchmark.traffic_per_token(model, context=100)
    state = 4 * c.num_delta_layers * (3 * c.conv_dim + 4 * 16 * 16)
    kv = c.num_attention_layers * 2 * c.num_key_value_heads * c.head_dim * 2
    assert traffic["state_bytes"] == state
    assert traffic["kv_bytes_per_token_of_context"] == kv
    assert traffic["bytes_read_per_token"] == traffic["weight_bytes_per_token"] + state + 100 * kv
    assert traffic["bytes_written_per_token"] == state + kv
    H, width = c.hidden_size, c.intermediate_size
    delta = H * (c.conv_dim + 64 + 2 * 4) + 64 * H
    attention = H * (2 * 4 * 32 + 2 * 2 * 32) + 4 * 32 * H
    elements = 4 * 3 * H * width + 3 * delta + attention
    assert benchmark.matrix_elements(model) == elements
    matrices = 2 * (elements + c.vocab_size * H + H)  # the head, and one row of the embedding
    vectors = traffic["weight_bytes_per_token"] - matrices
    assert vectors == 4 * (9 * H + 3 * (4 * c.conv_dim + 2 * 4 + 16) + 2 * 32)


def test_only_the_chosen_experts_count():
    from deltaic.model.weights import SparseFFN, TextWeights

    class Weight:
        def __init__(self, *shape: int) -> None:
            self.shape, self.nbytes = shape, int(np.prod(shape))

    class Model:
        class config:
            class text:
                is_moe, num_experts, num_experts_per_tok, num_attention_layers = True, 8, 2, 0

        class _runner:
            class text:
                weights = screen = None

        def new_state(self):
            class State:
                conv = delta = np.zeros(0)
                reserve = staticmethod(lambda n: None)

                class kv:
                    blocks = (np.zeros((0, 2, 1, 1, 1)),)

            return State

    ffn = SparseFFN(Weight(8, 10), Weight(8, 6, 10), Weight(8, 10, 3), Weight(4, 10), Weight(10, 2), Weight(1, 10))
    Model._runner.text.weights = TextWeights(Weight(100, 10), [ffn], np.zeros(10, np.float32), Weight(100, 10))
    traffic = benchmark.traffic_per_token(Model(), 5)
    experts = (8 * 6 * 10 + 8 * 10 * 3) // 4
    assert traffic["weight_bytes_per_token"] == experts + 80 + 40 + 20 + 10 + 40 + 1000 + 10


def test_command_line(capsys, tiny_folder):
    arguments = ["bench", str(tiny_folder), "--device", "reference", "--prompt", "6", "--new", "3", "--repeat", "1"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "prefill" in out
    assert "p99" in out
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 6


@pytest.mark.parametrize("wrong", [["--prompt", "0"], ["--new", "1"], ["--repeat", "0"], ["--prompt", "x"]])
def test_wrong_lengths_are_refused_before_loading(capsys, tmp_path, wrong):
    assert cli.main(["bench", str(tmp_path), *wrong]) == 2
    assert wrong[0].strip("-") in capsys.readouterr().err


def test_lengths_beyond_the_context(tiny_model):
    with pytest.raises(ContextLengthError, match="2048"):
        benchmark.measure(lambda: tiny_model, prompt=2047, new=2, repeat=1)
    with pytest.raises(ArgumentError):
        benchmark.measure(lambda: tiny_model, prompt=1.5, new=2, repeat=1)


def test_disturbed_tokens_are_counted_apart(monkeypatch, tiny_model):
    monkeypatch.setattr(benchmark, "PROBE_BYTES", 1 << 20)
    counts = iter(range(0, 10**6, 1))
    monkeypatch.setattr(benchmark, "preemptions", lambda: 10 * next(counts))
    facts = benchmark.measure(lambda: tiny_model, prompt=4, new=4, repeat=2)
    assert facts["disturbed_tokens"] == 6
    assert facts["latency_p99_undisturbed_ms"] is None
    monkeypatch.setattr(benchmark, "preemptions", lambda: 3)
    facts = benchmark.measure(lambda: tiny_model, prompt=4, new=4, repeat=1)
    assert facts["disturbed_tokens"] == 0
    assert facts["latency_p99_undisturbed_ms"] == facts["latency_p99_ms"]


def test_the_probe_is_not_in_the_memory(monkeypatch, tiny_folder):
    pytest.importorskip("deltaic.ops.cpu")
    if resident_bytes() is None:
        pytest.skip("this system does not tell")
    monkeypatch.setattr(benchmark, "_PEAK_SECONDS", 1e-4)
    model = deltaic.load(tiny_folder, device="cpu", cache_bytes=0)
    before = resident_bytes()["private"]
    facts = benchmark.measure(lambda: model, prompt=4, new=3, repeat=1)
    assert facts["memory"]["private"] - before < benchmark.PROBE_BYTES / 2


def test_resident_memory(tmp_path):
    found = resident_bytes()
    if found is not None:
        assert 0 < found["private"] <= found["now"] <= found["peak"]
    status = tmp_path / "status"
    status.write_text("Name:\tx\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\nRssAnon:\t  100 kB\n")
    assert resident_bytes(status) == {"now": 204800, "private": 102400, "peak": 307200}
    status.write_text("VmRSS:\t  200 kB\n")
    assert resident_bytes(status) is None
    assert resident_bytes(tmp_path / "none") is None


def test_probes(rng):
    cpu = pytest.importorskip("deltaic.ops.cpu")
    for size in (0, 64, 1 << 20, (1 << 20) + 65):
        cpu.probe_read(np.ones(size, np.uint8))
    assert cpu.probe_peak("f32", 10) == 5 * cpu.probe_peak("f32", 2) > 0
    with pytest.raises(ValueError, match="rounds"):
        cpu.probe_peak("f32", 0)
    with pytest.raises(ValueError, match="int4"):
        cpu.probe_peak("int4", 1)
