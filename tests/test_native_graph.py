"""What is seen of the compute graph: weights against the bytes of the file, activations against known ones."""

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import ggml
from runtime.errors import EngineError
from runtime.events import EngineSettings
from runtime.ggml import GgmlType
from runtime.native_graph import Node, Weights
from runtime.scoring import ScoringEngine
from tests.rpc import apart

SETTINGS = EngineSettings(n_ctx=32, n_batch=64, n_ubatch=64, n_threads=1)
CHUNKS = np.arange(5, 69, dtype=np.int32).reshape(2, 32)


@dataclass
class Seen:
    """An observer that copies what goes into and out of some nodes."""

    wanted: tuple[str, ...]
    """Names of nodes, or of weights."""
    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Name of a node → its values; name of a weight → what it is multiplied with."""
    asked: list[str] = field(default_factory=list)

    def wants(self, node: Node) -> bool:
        self.asked.append(node.operation)
        return node.name in self.wanted or (node.operation == "MUL_MAT" and node.source(0).name in self.wanted)

    def observe(self, node: Node) -> None:
        if node.name in self.wanted:
            self.values[node.name] = node.floats().copy()
        if node.operation == "MUL_MAT":
            self.values[node.source(0).name] = node.source(1).floats().copy()


def file_tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def found_weights(path: Path, settings: EngineSettings) -> dict[str, tuple[tuple[int, ...], int, bytes]]:
    """Shape, type and bytes of every weight that a batch was computed with."""
    weights = Weights()
    engine = ScoringEngine(path, settings, observer=weights)
    engine.read(CHUNKS)
    try:
        return {name: (tensor.shape, tensor.type, tensor.read().tobytes()) for name, tensor in weights.found.items()}
    finally:
        engine.close()


@pytest.mark.parametrize("level", ["BF16", "Q4_K_M", "Q2_K"])
def test_weights_are_the_files_bytes(level: str, demo_levels: dict[str, Path]) -> None:
    path = demo_levels[level]
    settings = EngineSettings(n_ctx=32, n_batch=64, n_threads=1, use_extra_bufts=False)
    there = {
        name: (tuple(int(n) for n in reversed(tensor.shape)), int(tensor.tensor_type), tensor.data.tobytes())
        for name, tensor in file_tensors(path).items()
    }
    assert found_weights(path, settings) == there


def test_weights_on_other_devices_are_the_files_bytes(demo_levels: dict[str, Path], servers: tuple[str, ...]) -> None:
    path = demo_levels["Q4_K_M"]
    settings = EngineSettings(n_ctx=32, n_batch=64, n_threads=1, rpc_servers=servers[:2], use_extra_bufts=False)
    found = apart(found_weights, path, settings)
    assert {name: data for name, (_, _, data) in found.items()} == {
        name: tensor.data.tobytes() for name, tensor in file_tensors(path).items()
    }


def test_what_a_weight_is_multiplied_with_gives_the_product(demo: Path) -> None:
    """Of the layer's input, in float64, with the file's own weights: what the node holds, but for BF16 rounding."""
    weight = "blk.3.ffn_down.weight"
    seen = Seen((weight, "ffn_out-3"))
    engine = ScoringEngine(demo, SETTINGS, observer=seen)
    engine.read(CHUNKS)
    engine.close()
    inputs, product = seen.values[weight], seen.values["ffn_out-3"]
    assert inputs.shape == (64, 1024)
    assert product.shape == (64, 256)
    bits = file_tensors(demo)[weight].data.view(np.uint16).astype(np.uint32) << 16
    rounded = ((inputs.view(np.uint32) + 0x7FFF + (inputs.view(np.uint32) >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    expected = rounded.astype(np.float64) @ bits.view(np.float32).astype(np.float64).T
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))


def test_every_operation_has_ggmls_name(demo: Path) -> None:
    seen = Seen(())
    engine = ScoringEngine(demo, SETTINGS, observer=seen)
    engine.read(CHUNKS)
    engine.close()
    assert {"GET_ROWS", "RMS_NORM", "MUL_MAT", "ROPE", "ADD"} <= set(seen.asked)
    assert seen.asked.count("RMS_NORM") == 2 * 8 + 1


class Permuted:
    """Wants a view that is not contiguous, and what it views."""

    def __init__(self) -> None:
        self.pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []

    def wants(self, node: Node) -> bool:
        return node.operation == "PERMUTE" and node.type == GgmlType.F32

    def observe(self, node: Node) -> None:
        self.pairs.append((node.floats().copy(), node.source(0).floats().copy()))


def permuted(path: Path, settings: EngineSettings) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    seen = Permuted()
    engine = ScoringEngine(path, settings, observer=seen)
    engine.read(CHUNKS)
    engine.close()
    return seen.pairs


def check_permuted(pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> None:
    assert pairs
    for view, source in pairs:  # (…, heads, tokens, width) of (…, tokens, heads, width)
        assert source.shape[-3] == 32
        np.testing.assert_array_equal(view, source.swapaxes(-3, -2))


def test_views_that_are_not_contiguous(demo: Path) -> None:
    check_permuted(permuted(demo, SETTINGS))


def test_views_that_are_not_contiguous_on_another_device(demo: Path, servers: tuple[str, ...]) -> None:
    settings = EngineSettings(n_ctx=32, n_batch=64, n_threads=1, rpc_servers=servers[:1])
    check_permuted(apart(permuted, demo, settings))


# Replacing weights

REPLACED = "blk.5.ffn_up.weight"


@pytest.fixture
def changed(demo: Path, tmp_path: Path) -> tuple[Path, NDArray[np.uint8]]:
    """The demo with other bytes in one weight, and the bytes: its values after a round trip through Q2_K."""
    tensor = file_tensors(demo)[REPLACED]
    values = (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    blocks = np.empty(values.shape[0] * ggml.row_bytes(GgmlType.Q2_K, values.shape[1]), np.uint8)
    ggml.quantize(values, GgmlType.Q2_K, blocks)
    rough = np.empty_like(values)
    ggml.dequantize(blocks, GgmlType.Q2_K, rough)
    data = (rough.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
    content = bytearray(demo.read_bytes())
    content[tensor.data_offset : tensor.data_offset + data.size] = data.tobytes()
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    return path, data


def logits(path: Path) -> NDArray[np.float32]:
    engine = ScoringEngine(path, SETTINGS)
    rows = engine.logits(CHUNKS, 16).copy()
    engine.close()
    return rows


def test_a_replaced_weight_acts_like_a_file_with_its_bytes(demo: Path, changed: tuple[Path, NDArray[np.uint8]]) -> None:
    path, data = changed
    before, after = logits(demo), logits(path)
    assert np.abs(before - after).max() > 0.01
    weights = Weights()
    engine = ScoringEngine(demo, SETTINGS, observer=weights, writable=True)
    np.testing.assert_array_equal(engine.logits(CHUNKS, 16), before)
    original = weights.found[REPLACED].read()
    weights.found[REPLACED].write(data)
    np.testing.assert_array_equal(weights.found[REPLACED].read(), data)
    np.testing.assert_array_equal(engine.logits(CHUNKS, 16), after)
    weights.found[REPLACED].write(original)
    np.testing.assert_array_equal(engine.logits(CHUNKS, 16), before)
    engine.close()


def replaced_elsewhere(path: Path, data: NDArray[np.uint8], settings: EngineSettings) -> list[NDArray[np.float32]]:
    """Logits before, with the weight replaced, and with its own bytes again."""
    weights = Weights()
    engine = ScoringEngine(path, settings, observer=weights, writable=True)
    rows = [engine.logits(CHUNKS, 16).copy()]
    original = weights.found[REPLACED].read()
    for content in (data, original):
        weights.found[REPLACED].write(content)
        rows.append(engine.logits(CHUNKS, 16).copy())
    engine.close()
    return rows


def test_a_weight_on_another_device_is_replaced(
    demo: Path, changed: tuple[Path, NDArray[np.uint8]], servers: tuple[str, ...]
) -> None:
    path, data = changed
    settings = EngineSettings(n_ctx=32, n_batch=64, n_threads=1, rpc_servers=servers[:2])
    before, with_data, again = apart(replaced_elsewhere, demo, data, settings)
    after = apart(replaced_elsewhere, path, data, settings)[0]
    np.testing.assert_array_equal(with_data, after)
    np.testing.assert_array_equal(again, before)
    assert np.abs(before - after).max() > 0.01


def test_a_weight_mapped_from_its_file_is_not_replaced(demo: Path) -> None:
    weights = Weights()
    engine = ScoringEngine(demo, SETTINGS, observer=weights)
    engine.read(CHUNKS)
    with pytest.raises(EngineError, match="open the model writable"):
        weights.found[REPLACED].write(weights.found[REPLACED].read())
    engine.close()


def test_a_repacked_weight_is_not_read(demo_levels: dict[str, Path]) -> None:
    """Which types are repacked depends on the processor, so all that is said here: bytes, or one line."""
    there = file_tensors(demo_levels["Q4_K_M"])
    weights = Weights()
    engine = ScoringEngine(demo_levels["Q4_K_M"], SETTINGS, observer=weights)
    engine.read(CHUNKS)
    for name, tensor in weights.found.items():
        if tensor.is_host:
            assert tensor.read().tobytes() == there[name].data.tobytes(), name
        else:
            with pytest.raises(EngineError, match="open the model writable"):
                tensor.read()
    engine.close()


# Exceptions


class Failing:
    """Raises when it is asked of, or shown, the n-th product."""

    def __init__(self, error: BaseException, n: int, at: str) -> None:
        self.error, self.left, self.at = error, n, at

    def wants(self, node: Node) -> bool:
        return node.operation == "MUL_MAT" and self._count("wants")

    def observe(self, node: Node) -> None:
        self._count("observe")

    def _count(self, at: str) -> bool:
        if at == self.at:
            self.left -= 1
            if self.left == 0:
                raise self.error
        return True


@pytest.mark.parametrize("at", ["wants", "observe"])
@pytest.mark.parametrize("error", [ValueError("no good"), KeyboardInterrupt()])
def test_an_exception_comes_out_of_the_decode(error: BaseException, at: str, demo: Path) -> None:
    failing = Failing(error, 20, at)
    engine = ScoringEngine(demo, SETTINGS, observer=failing)
    with pytest.raises(type(error)) as caught:
        engine.read(CHUNKS)
    assert caught.value is error
    assert failing.left == 0
    np.testing.assert_array_equal(engine.logits(CHUNKS, 16), logits(demo))  # and the engine is as good as new
    engine.close()


def read_until_interrupted(engine: ScoringEngine, delay: float) -> None:
    """Ctrl-C comes from another thread, after `delay` seconds."""

    def press() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    for _ in range(100):  # seconds
        engine.read(CHUNKS)


def test_ctrl_c_comes_out_of_the_decode_wherever_it_hits(demo: Path) -> None:
    """Lost in a callback, it would be an unraisable exception, for which pytest fails the test."""
    engine = ScoringEngine(demo, SETTINGS, observer=Seen(("attn_norm-3", "ffn_out-5")))
    handler = signal.getsignal(signal.SIGINT)
    for i in range(15):
        with pytest.raises(KeyboardInterrupt):
            read_until_interrupted(engine, 0.01 + i * 1e-3)
        assert signal.getsignal(signal.SIGINT) is handler
    np.testing.assert_array_equal(engine.logits(CHUNKS, 16), logits(demo))
    engine.close()


def test_an_engine_in_another_thread_leaves_ctrl_c_alone(demo: Path) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            engine = ScoringEngine(demo, SETTINGS, observer=Weights())
            engine.read(CHUNKS)
            engine.close()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
