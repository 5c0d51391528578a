"""The arithmetic of benchmarks/scaling.py, by hand where it can be, and beside what others published."""

from dataclasses import replace

import pytest

from benchmarks.scaling import (
    EFFICIENCY,
    H100,
    LLAMA_8B,
    NANOCHAT_D24,
    Device,
    Run,
    Shape,
    bytes_per_parameter,
    compare,
    memory_bytes,
    step_seconds,
)

# 2 layers of width 4, 2 heads of 2, feed-forward 8 gated: a block has 4 x 4 x 4 + 3 x 4 x 8 = 160 weights.
TINY = Shape(layers=2, width=4, heads=2, kv_heads=2, head_dim=2, intermediate=8, vocabulary=10)
ONE = Device(peak=1e6, memory=1e9, link=1e4, network=1e3, per_machine=2)


def test_parameters_and_flops_by_hand():
    assert (TINY.block, TINY.head, TINY.parameters) == (160, 40, 400)
    assert replace(TINY, tied=True).parameters == 360
    assert TINY.flops_per_token(context=3) == 6 * (2 * 160 + 40) + 12 * 2 * 2 * 2 * 3
    assert LLAMA_8B.parameters == pytest.approx(8.03e9, rel=1e-3)


def test_flops_are_those_that_nanochat_counts():
    assert NANOCHAT_D24.flops_per_token(2048) == pytest.approx(4.330784131228946e19 / (16704 * 524288), rel=1e-4)
    assert pytest.approx(0.5, abs=1e-3) == EFFICIENCY


def test_a_step_is_compute_or_communication_and_what_nothing_hides():
    alone = step_seconds(Run(TINY, 1, "ddp", context=3, rows=5, accumulation=2), ONE, 0.5)
    assert alone["compute_seconds"] == pytest.approx(30 * TINY.flops_per_token(3) / 5e5)
    assert alone["communication_seconds"] == 0
    assert alone["tokens_per_second_per_device"] == pytest.approx(5e5 / TINY.flops_per_token(3))
    two = step_seconds(Run(TINY, 2, "ddp", context=3, rows=5, accumulation=2), ONE, 0.5)
    assert two["communication_seconds"] == pytest.approx(2 * 0.5 * 4 * 400 / 8e3)
    assert two["step_seconds"] == pytest.approx(two["communication_seconds"] * 1.5)  # it takes longer than 0.135 s
    four = {mode: step_seconds(Run(TINY, 4, mode, 3, 5), ONE, 0.5) for mode in ("fsdp2", "hsdp")}
    assert four["fsdp2"]["communication_seconds"] == pytest.approx(0.75 * 8 * 400 / 800)
    assert four["hsdp"]["communication_seconds"] == pytest.approx(0.5 * 8 * 400 / 8e3 + 2 * 0.5 * 4 * 400 / 2 / 800)
    whole = step_seconds(Run(TINY, 1, "ddp", 3, 5, recompute="full"), ONE, 0.5)
    assert whole["compute_seconds"] == pytest.approx(4 / 3 * 15 * TINY.flops_per_token(3) / 5e5)


def test_memory_by_hand():
    # inputs, norms and residuals 4 x 4, attention 2 x 2 x 4, feed-forward 4 x 8: 64 numbers of two bytes a token
    assert TINY.activation_bytes() == 128
    kept = memory_bytes(Run(TINY, 4, "fsdp2", context=3, rows=5, logit_bytes=10), ONE)
    assert kept["states"] == 16 * 400 / 4
    assert kept["activations"] == 15 * 2 * 128
    assert kept["logits"] == 15 * 10 * 10
    again = memory_bytes(Run(TINY, 4, "hsdp", context=3, rows=5, recompute="full"), ONE)
    assert again["states"] == 16 * 400 / 2
    assert again["activations"] == 15 * (2 * 4 * 2 + 128)
    assert bytes_per_parameter("fsdp2", 8) == 2
    assert bytes_per_parameter("ddp", 8) == 18


def test_published_runs_are_within_a_fifth():
    rows = compare()
    assert len(rows) == 5
    assert all(abs(row["off"]) < 0.2 for row in rows), rows
    slower = [row["published"] for row in rows if "torchtitan" in row["metric"] and "tokens" in row["metric"]]
    model = [row["predicted"] for row in rows if "torchtitan" in row["metric"] and "tokens" in row["metric"]]
    assert model[1] / model[0] == pytest.approx(slower[1] / slower[0], abs=0.01)  # from 8 to 128 GPUs
    assert H100.memory == 80e9
