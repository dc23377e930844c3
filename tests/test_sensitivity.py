"""Disturbing a loaded model: against models loaded from files that were disturbed; and the file of measurements."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from quant.choosing.disturbance import Disturbance, divergence, spread
from quant.choosing.sensitivity import Measurement, Sensitivity, SensitivityError, Setting, groups, load, save
from quant.inputs import open_source
from quant.quality.texts import model_input
from quant.recipes import TensorSpec, tensors
from runtime.events import EngineSettings
from runtime.ggml import GgmlType, quantize, row_bytes
from runtime.scoring import ScoringEngine
from tests.checkpoints import DEMO, DEMO_SHAPE

SETTINGS = EngineSettings(n_ctx=64, n_batch=128, n_ubatch=128, n_threads=1)
CHUNKS = np.random.default_rng(1).integers(10, 4000, (4, 64), np.int32)
SETTING = Setting("Demo", "BF16", "ab" * 32, "prose,code", "cd" * 32, 64, 4, "", "ggml", "0c1e57098")
NONE = Sensitivity(SETTING)
Q2_K, Q6_K = GgmlType.Q2_K, GgmlType.Q6_K


@pytest.fixture
def scorer(demo: Path) -> Iterator[ScoringEngine]:
    engine = ScoringEngine(demo, SETTINGS, writable=True)
    yield engine
    engine.close()


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(exact / exact.sum(axis=-1, keepdims=True))


def _probabilities(path: Path) -> NDArray[np.float64]:
    """Of the second halves of all chunks, (C, 31, V)."""
    engine = ScoringEngine(path, replace(SETTINGS, use_extra_bufts=False))
    try:
        read = model_input(CHUNKS, engine.bos, engine.adds_bos)
        return np.concatenate([_softmax(engine.logits(read[i : i + 2], 32)[:, :-1]) for i in (0, 2)])
    finally:
        engine.close()


def _disturbed_file(demo: Path, path: Path, names: tuple[str, ...], type_: GgmlType) -> Path:
    """The demo's file with these tensors as ggml makes and gguf reads them, rounded to BF16 by gguf."""
    shutil.copy(demo, path)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name in names:
            rows = gguf.dequantize(tensor.data, tensor.tensor_type)
            blocks = np.empty((len(rows), row_bytes(type_, rows.shape[1])), np.uint8)
            quantize(rows, type_, blocks)
            values = gguf.dequantize(blocks, gguf.GGMLQuantizationType[type_.name])
            tensor.data[:] = gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
    return path


@pytest.mark.parametrize(
    "names", [("output.weight",), ("token_embd.weight",), ("blk.1.attn_q.weight", "blk.2.attn_q.weight")]
)
def test_a_disturbed_model_is_the_one_whose_file_was(
    names: tuple[str, ...], demo: Path, scorer: ScoringEngine, tmp_path: Path
) -> None:
    """Its KL divergence in float64, from two models that were loaded for it. Rows of attn_q are reordered for GGUF."""
    disturbance = Disturbance(scorer, scorer.weights(), open_source(DEMO, "Demo"), None, threads=2)
    (found,) = disturbance.measure(CHUNKS, [(names, Q2_K)], NONE, lambda _: None).measurements
    p, q = _probabilities(demo), _probabilities(_disturbed_file(demo, tmp_path / "d.gguf", names, Q2_K))
    kld = (p * np.log(p / q)).sum(axis=-1).reshape(-1)
    assert found.kld == pytest.approx(kld.mean(), rel=1e-3)
    assert found.error == pytest.approx(kld.std() / math.sqrt(len(kld) - 1), rel=1e-2)
    np.testing.assert_allclose(found.klds, kld.reshape(len(CHUNKS), -1).mean(axis=1), rtol=1e-3)


def test_what_is_known_is_not_measured_again_and_the_model_is_left_as_it_was(scorer: ScoringEngine) -> None:
    weights = scorer.weights()
    before = {name: weight.read().tobytes() for name, (weight,) in weights.items() if "blk.0" in name}
    disturbance = Disturbance(scorer, weights, open_source(DEMO, "Demo"), None, threads=2)
    wanted = [((name,), Q6_K) for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight")]
    known = Measurement(("blk.0.attn_q.weight",), Q6_K, (42.0,), 1.0)
    kept: list[Sensitivity] = []
    found = disturbance.measure(CHUNKS[:1], wanted, replace(NONE, measurements=(known,)), kept.append)
    assert [found] == kept
    assert found.measurements[0] == known
    assert [m.tensors for m in found.measurements] == [names for names, _ in wanted]
    assert 0 < found.measurements[1].kld < 0.1
    assert {name: weights[name][0].read().tobytes() for name in before} == before


def test_whatever_ends_it_the_model_is_left_as_it_was(scorer: ScoringEngine) -> None:
    weights = scorer.weights()
    name = "blk.0.ffn_down.weight"
    before = weights[name][0].read().tobytes()

    class Interrupted:
        """The engine, until the chunks are read a second time."""

        n_vocab, n_ctx, n_seq, bos, adds_bos = scorer.n_vocab, scorer.n_ctx, scorer.n_seq, scorer.bos, scorer.adds_bos
        info, tokenize, close = scorer.info, scorer.tokenize, scorer.close
        n_reads = 0

        def logits(self, chunks: NDArray[np.int32], first: int) -> NDArray[np.float32]:
            self.n_reads += 1
            if self.n_reads > 1:
                assert weights[name][0].read().tobytes() != before
                raise KeyboardInterrupt
            return scorer.logits(chunks, first)

    kept: list[Sensitivity] = []
    disturbance = Disturbance(Interrupted(), weights, open_source(DEMO, "Demo"), None)
    with pytest.raises(KeyboardInterrupt):
        disturbance.measure(CHUNKS[:2], [((name,), Q2_K)], NONE, kept.append)
    assert weights[name][0].read().tobytes() == before
    assert kept == []


def test_a_weight_that_the_model_lacks_is_refused(scorer: ScoringEngine) -> None:
    weights = {name: weight for name, weight in scorer.weights().items() if name != "output.weight"}
    disturbance = Disturbance(scorer, weights, open_source(DEMO, "Demo"), None)
    with pytest.raises(SensitivityError, match=r"does not compute with output\.weight"):
        disturbance.measure(CHUNKS[:1], [(("output.weight",), Q2_K)], NONE, lambda _: None)


def test_both_copies_of_a_tied_embedding_are_disturbed(scorer: ScoringEngine) -> None:
    """On a device of its own the output has another copy of the weights."""

    @dataclass
    class Copy:
        type: int
        n_bytes: int
        written: list[bytes] = field(default_factory=list)

        def read(self) -> NDArray[np.uint8]:
            return np.zeros(self.n_bytes, np.uint8)

        def write(self, data: NDArray[np.uint8]) -> None:
            self.written.append(data.tobytes())

    (weight,) = scorer.weights()["token_embd.weight"]
    copy = Copy(weight.type, weight.n_bytes)
    disturbance = Disturbance(scorer, {"token_embd.weight": (weight, copy)}, open_source(DEMO, "Demo"), None)
    disturbance.measure(CHUNKS[:1], [(("token_embd.weight",), Q2_K)], NONE, lambda _: None)
    disturbed, restored = copy.written
    assert len(disturbed) == len(restored) == weight.n_bytes
    assert any(disturbed)
    assert not any(restored)


def test_too_many_chunks_are_refused_with_both_numbers(scorer: ScoringEngine) -> None:
    many = np.broadcast_to(CHUNKS[:1], (9_000, 64))
    with pytest.raises(SensitivityError, match=r"9000 chunks need 4,571,136,000 bytes .* at most 4,294,967,296"):
        Disturbance(scorer, {}, open_source(DEMO, "Demo"), None).measure(
            many, [(("output.weight",), Q2_K)], NONE, lambda _: None
        )


def test_divergence_is_the_sum_over_all_tokens() -> None:
    rng = np.random.default_rng(2)
    base, other = rng.standard_normal((2, 300, 700)).astype(np.float32) * 3
    p, q = _softmax(base), _softmax(other)
    found = divergence(other, np.log(p).astype(np.float32))
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(axis=1), rtol=1e-5)
    nearly = base + rng.standard_normal(base.shape).astype(np.float32) * np.float32(1e-3)
    exact = (p * np.log(p / _softmax(nearly))).sum(axis=1)
    assert divergence(nearly, np.log(p).astype(np.float32)).mean() == pytest.approx(exact.mean(), abs=2e-8)


def test_chunks_are_spread_over_all_texts() -> None:
    texts = [np.arange(n, dtype=np.int32)[:, None] + 100 * i for i, n in enumerate((2, 6))]
    assert spread(texts, 4)[:, 0].tolist() == [0, 100, 102, 104]
    assert spread(texts, 99)[:, 0].tolist() == [0, 1, 100, 101, 102, 103, 104, 105]


def test_groups_are_of_a_kind_and_of_neighbouring_layers() -> None:
    specs = tensors(DEMO_SHAPE)
    one, three = groups(specs), groups(specs, 3)
    assert len(one) == 2 + 7 * 8
    assert all(len(names) == 1 for names in one)
    assert len(three) == 2 + 7 * 3
    assert ("blk.6.ffn_up.weight", "blk.7.ffn_up.weight") in three
    for found in (one, three):
        names = [name for group in found for name in group]
        assert sorted(names) == sorted(spec.name for spec in specs if not spec.is_vector)
    assert groups([TensorSpec("blk.0.attn_norm.weight", (4,))]) == ()


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "s.json"
    sensitivity = replace(
        NONE, measurements=(Measurement(("a", "b"), Q2_K, (0.1, 0.3), 1e-9), Measurement(("c",), Q6_K, (0.0, 0.0), 0.0))
    )
    save(sensitivity, path)
    assert load(path, SETTING) == sensitivity
    assert sum('"klds"' in line for line in path.read_text().splitlines()) == 2
    save(NONE, path)
    assert load(path) == NONE
    assert [file.name for file in path.parent.iterdir()] == ["s.json"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("chunks", 8, "chunks 4 and this run has 8"),
        ("imatrix_sha256", "ef" * 32, "imatrix sha256 none and this run has efefefefefef…"),
        ("model_sha256", "00" * 32, "abababababab… and this run has 000000000000…"),
    ],
)
def test_a_file_of_another_setting_is_refused(field: str, value: object, words: str, tmp_path: Path) -> None:
    save(NONE, tmp_path / "s.json")
    with pytest.raises(SensitivityError, match=words):
        load(tmp_path / "s.json", replace(SETTING, **{field: value}))  # type: ignore[arg-type]
    assert replace(SETTING, **{field: value}).file_name != SETTING.file_name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.pop("setting"),
        lambda data: data.update(format=2),
        lambda data: data["setting"].update(chunks="4"),
        lambda data: data["setting"].update(more=1),
        lambda data: data["measurements"].append({"tensors": ["a"], "type": "Q9_K", "klds": [1], "error": 1}),
        lambda data: data["measurements"].append({"tensors": ["a"], "type": "Q2_K", "klds": ["x"], "error": 1}),
        lambda data: data.update(measurements=3),
        lambda data: data["measurements"].append({"tensors": ["a"], "type": "Q2_K", "klds": [], "error": 1}),
    ],
)
def test_a_damaged_file_is_one_line(edit: object, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    save(NONE, path)
    data = json.loads(path.read_text())
    edit(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))
    with pytest.raises(SensitivityError, match=r"s\.json: not a file of measurements that this Bise reads"):
        load(path)


def test_what_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("[1, 2")
    with pytest.raises(SensitivityError, match=r"s\.json: not a file of measurements"):
        load(tmp_path / "s.json")
    (tmp_path / "s.json").write_text("[1, 2]")
    with pytest.raises(SensitivityError, match=r"s\.json: not a file of measurements"):
        load(tmp_path / "s.json")
    with pytest.raises(SensitivityError, match=r"none\.json: cannot be read"):
        load(tmp_path / "none.json")
