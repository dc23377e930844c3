"""Distortion and sensitivity → losses: the encoder's errors by hand, fits and ranks whose answers are known."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from quant.choosing.distortion import Distortion, distortions
from quant.choosing.losses import fit, measured_losses, proxy_losses, rank_correlations, total
from quant.choosing.sensitivity import Measurement
from quant.imatrix import read_imatrix
from quant.inputs import open_source
from quant.recipes import TensorSpec
from runtime.ggml import GgmlType, quantize, row_bytes
from tests.checkpoints import DEMO

MATRIX = Path(__file__).parent / "reference" / "demo-imatrix.gguf"
Q2_K, Q3_K, Q4_K, Q6_K, Q8_0 = GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.Q8_0


@pytest.mark.parametrize("known", ["", "importance", "importance and means"])
def test_distortion_is_the_squared_error_of_what_ggml_makes(known: str, demo: Path) -> None:
    """ggml's own encoder, gguf's decoder, and sums in float64."""
    source = open_source(DEMO, "Demo")
    matrix = read_imatrix(MATRIX) if known else None
    name = "blk.3.attn_k.weight"
    means = np.zeros(256, np.float32)
    if matrix is not None and "means" in known:
        means = (np.random.default_rng(0).uniform(-1, 1, 256) * np.sqrt(matrix.values[name])).astype(np.float32)
        matrix = replace(matrix, means={name: means})
    (found,) = distortions(source, {name: (Q2_K, Q6_K, GgmlType.BF16)}, matrix, threads=2).values()

    stored = next(tensor for tensor in gguf.GGUFReader(demo).tensors if tensor.name == name)
    rows = gguf.dequantize(stored.data, stored.tensor_type)
    columns = matrix.values[name] if matrix is not None else np.ones(rows.shape[1], np.float32)

    def expected(factors: NDArray[np.float64]) -> float:
        """Of the square of the product with what has these mean squares and means, column by column independently."""
        variance = columns.astype(np.float64) - means.astype(np.float64) ** 2
        return float((factors**2 @ variance).sum() + ((factors @ means.astype(np.float64)) ** 2).sum())

    assert found.energy == pytest.approx(expected(rows.astype(np.float64)), rel=1e-5)
    for type_ in (Q2_K, Q6_K):
        blocks = np.empty((len(rows), row_bytes(type_, rows.shape[1])), np.uint8)
        quantize(rows, type_, blocks, columns if matrix is not None else None)
        difference = gguf.dequantize(blocks, gguf.GGMLQuantizationType[type_.name]).astype(np.float64) - rows
        assert found.errors[type_] == pytest.approx(expected(difference), rel=1e-4)
    assert found.errors[GgmlType.BF16] == 0


def test_a_sample_of_the_rows_stands_for_all() -> None:
    source = open_source(DEMO, "Demo")
    types = {"output.weight": (Q2_K, Q6_K), "blk.0.attn_k.weight": (Q4_K,)}
    whole, part = (distortions(source, types, sample=sample) for sample in (1 << 30, 1 << 19))
    assert part["blk.0.attn_k.weight"] == whole["blk.0.attn_k.weight"]
    assert part["output.weight"] != whole["output.weight"]
    for type_ in types["output.weight"]:
        assert part["output.weight"].relative(type_) == pytest.approx(whole["output.weight"].relative(type_), rel=0.1)


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    source = open_source(DEMO, "Demo")
    types = {"token_embd.weight": (Q2_K,), "blk.1.ffn_up.weight": (Q2_K,)}
    assert distortions(source, types, threads=1) == distortions(source, types, threads=3)


def test_a_line_is_found_with_its_floor() -> None:
    errors = [0.07, 0.005, 0.0004]
    slope, floor = fit(errors, [7e-6 + 0.02 * error for error in errors])
    assert (slope, floor) == pytest.approx((0.02, 7e-6))


@pytest.mark.parametrize(
    ("errors", "klds", "line"),
    [
        ([0.1], [0.03], (0.3, 0.0)),  # one point has no floor
        ([0.1, 0.01], [0.0308, 0.0028], (0.30, 0.0)),  # a floor below 0 is none: near 0.308 and 0.28
        ([0.1, 0.01], [1e-5, 2e-5], (0.0, 1.2e-5)),  # a fall is chance: the mean, by relative weight
        ([0.1, 0.1], [0.03, 0.03], (0.3, 0.0)),
        ([0.0, 0.0], [0.0, 0.0], (0.0, 0.0)),
    ],
)
def test_a_line_is_never_absurd(errors: list[float], klds: list[float], line: tuple[float, float]) -> None:
    assert fit(errors, klds) == pytest.approx(line, rel=0.05)


def test_losses_follow_the_error_from_type_to_type_and_leave_the_floor_out() -> None:
    distortions = {
        "a": Distortion(10.0, {Q2_K: 1.0, Q4_K: 0.1, Q8_0: 0.0}),
        "b": Distortion(2.0, {Q2_K: 0.2, Q4_K: 0.02, Q8_0: 0.001}),
        "c": Distortion(1.0, {Q2_K: 0.2, Q4_K: 0.02, Q8_0: 0.001}),
    }
    measurements = [
        Measurement(("a",), Q2_K, (0.1 * 0.5 + 1e-5,), 1e-6),
        Measurement(("a",), Q4_K, (0.01 * 0.5 + 1e-5,), 1e-6),
        Measurement(("b", "c"), Q2_K, ((0.1 + 0.2) * 2,), 1e-3),  # together: an error of each counts alike
    ]
    losses = measured_losses(distortions, measurements)
    assert losses["a"] == pytest.approx({Q2_K: 0.05, Q4_K: 0.005, Q8_0: 0})
    assert losses["b"] == pytest.approx({Q2_K: 0.2, Q4_K: 0.02, Q8_0: 0.001})
    assert losses["c"] == pytest.approx({Q2_K: 0.4, Q4_K: 0.04, Q8_0: 0.002})
    chosen = {"a": Q2_K, "b": Q4_K, "c": Q8_0, "norm": GgmlType.F32}
    assert total(losses, chosen) == pytest.approx(0.05 + 0.02 + 0.002)


def test_every_chunk_counts_alike() -> None:
    """The second chunk diverges 100 times as much, and mostly by b."""
    distortions = {name: Distortion(1.0, {Q2_K: 0.1, Q4_K: 0.01}) for name in "ab"}
    measurements = [Measurement(("a",), Q2_K, (0.008, 0.2), 1e-6), Measurement(("b",), Q2_K, (0.002, 0.8), 1e-6)]
    losses = measured_losses(distortions, measurements)
    assert losses["a"][Q2_K] / losses["b"][Q2_K] == pytest.approx((0.8 + 0.2) / (0.2 + 0.8))
    harmonic = 2 / (1 / 0.01 + 1 / 1.0)
    assert losses["a"][Q2_K] + losses["b"][Q2_K] == pytest.approx(harmonic)


def test_the_proxy_follows_an_error_to_the_residual_stream() -> None:
    """One layer: an embedding of energy 2 a token, attention that adds 6, a feed-forward network that adds 8."""
    energies = {"attn_q": 1, "attn_k": 1, "attn_v": 1, "attn_output": 6, "ffn_gate": 1, "ffn_up": 1, "ffn_down": 8}
    distortions = {f"blk.0.{kind}.weight": Distortion(e, {Q2_K: 0.1 * e}) for kind, e in energies.items()}
    distortions |= {"token_embd.weight": Distortion(20, {Q2_K: 2}), "output.weight": Distortion(5, {Q2_K: 0.5})}
    specs = [TensorSpec(name, (10, 4)) for name in distortions]
    proxy = {name.removeprefix("blk.0."): its[Q2_K] for name, its in proxy_losses(distortions, specs).items()}
    attention, network = 0.1 * 6 / (2 + 6), 0.1 * 8 / (2 + 6 + 8)
    assert proxy == pytest.approx(
        {
            "attn_q.weight": attention / 2,
            "attn_k.weight": attention,
            "attn_v.weight": attention,
            "attn_output.weight": attention,
            "ffn_gate.weight": network,
            "ffn_up.weight": network / 2,
            "ffn_down.weight": network,
            "token_embd.weight": 0.1,
            "output.weight": 0.1,
        }
    )


def test_rank_correlations_are_those_of_the_textbooks() -> None:
    """The examples of SciPy's documentation for spearmanr and kendalltau, and the extremes."""
    assert rank_correlations([1, 2, 3, 4, 5], [5, 6, 7, 8, 7])[0] == pytest.approx(0.82078268)
    assert rank_correlations([12, 2, 1, 12, 2], [1, 4, 7, 1, 0])[1] == pytest.approx(-0.47140452)
    assert rank_correlations([1, 2, 3], [10, 20, 30]) == pytest.approx((1, 1))
    assert rank_correlations([1, 2, 3], [3, 2, 1]) == pytest.approx((-1, -1))
    assert rank_correlations([1, 2, 3], [5, 5, 5]) == (0, 0)
