"""Laying a GGUF file over the devices: what its header says, how it is split, when it is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from quant import recipes
from runtime.errors import EngineError, ModelFileError
from runtime.events import EngineSettings
from runtime.fitting import RESERVE, fitted, in_llama_order, read_weights
from runtime.hardware import Device
from runtime.levels import Shape
from runtime.native_file import read_header

GIB = 2**30


def _gpu(name: str, free: int) -> Device:
    """A card with so much free beyond the reserve."""
    return Device(name, "a card", "gpu", free + RESERVE, free + RESERVE)


def test_the_header_agrees_with_the_gguf_package(demo_levels: dict[str, Path]) -> None:
    for level in ("BF16", "Q2_K", "Q4_K_M"):
        path = demo_levels[level]
        header, reader = read_header(path), GGUFReader(str(path))
        assert header.tensors == {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
        assert header.numbers["llama.block_count"] == 8
        assert header.texts["general.name"] == "Demo"
        assert header.lengths["tokenizer.ggml.tokens"] == 4096


def test_weights_and_shape_come_from_the_header(demo_levels: dict[str, Path]) -> None:
    read = read_weights(demo_levels["Q4_K_M"])
    assert read is not None
    weights, shape = read
    assert shape == Shape(n_layers=8, n_embd=256, n_ff=1024, n_heads=8, n_heads_kv=2, head_dim=32, n_vocab=4096)
    assert weights.total == recipes.tensor_bytes(shape, "Q4_K_M")
    assert len(set(weights.layers)) == 2, "Q4_K_M gives some layers more bits"


def test_tied_embeddings_count_on_the_last_device_too(tmp_path: Path) -> None:
    path = tmp_path / "tied.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in (("block_count", 1), ("embedding_length", 32), ("feed_forward_length", 64)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_tensor("token_embd.weight", np.zeros((100, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_weights(path)
    assert read is not None
    assert (read[0].host, read[0].layers, read[0].output) == (100 * 32 * 4, (32 * 4,), 100 * 32 * 4 + 32 * 4)
    assert read[1].n_heads_kv == 4, "without its own key there are as many K and V heads as query heads"


def test_an_unknown_layout_is_left_to_llama_cpp(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = GGUFWriter(path, "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((10, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_weights(path) is None
    settings = EngineSettings(n_ctx=512)
    assert fitted(path, settings, [_gpu("CUDA0", GIB), _gpu("CUDA1", GIB)]) is settings


def test_a_damaged_header_is_refused(demo_levels: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(demo_levels["Q4_K_M"].read_bytes()[:5000])
    with pytest.raises(ModelFileError, match=r"cut\.gguf: its header is damaged .*; copy it again or remake it"):
        read_header(path)


def test_without_a_gpu_nothing_changes(demo_levels: dict[str, Path]) -> None:
    settings = EngineSettings(n_ctx=512)
    cpu = Device("CPU", "", "cpu", GIB, GIB)
    assert fitted(demo_levels["Q4_K_M"], settings, [cpu]) is settings
    assert fitted(demo_levels["Q4_K_M"], settings, [cpu, _gpu("CUDA0", GIB)]) is settings, "one card holds all"


def test_two_equal_cards_share_the_layers(demo_levels: dict[str, Path]) -> None:
    split = fitted(demo_levels["Q8_0"], EngineSettings(n_ctx=512), [_gpu("CUDA0", GIB), _gpu("CUDA1", GIB)])
    assert split.tensor_split is not None
    assert sum(split.tensor_split) == pytest.approx(9), "eight layers and the output"


def test_the_users_own_placement_stands(demo_levels: dict[str, Path]) -> None:
    cards = [_gpu("CUDA0", GIB), _gpu("CUDA1", GIB)]
    for settings in (EngineSettings(n_ctx=512, tensor_split=(1.0, 3.0)), EngineSettings(n_ctx=512, n_gpu_layers=0)):
        assert fitted(demo_levels["Q8_0"], settings, cards) is settings


def test_the_layers_that_are_to_be_on_gpus_are_shared(demo_levels: dict[str, Path]) -> None:
    cards = [_gpu("CUDA0", GIB), _gpu("CUDA1", GIB)]
    split = fitted(demo_levels["Q8_0"], EngineSettings(n_ctx=512, n_gpu_layers=5), cards)
    assert split.n_gpu_layers == 5
    assert split.tensor_split is not None
    assert sum(split.tensor_split) == pytest.approx(5), "four layers and the output"


def test_what_cannot_fit_is_refused_with_what_would(demo_levels: dict[str, Path]) -> None:
    path, settings = demo_levels["Q4_K_M"], EngineSettings(n_ctx=2048)
    cards = [_gpu("CUDA0", 20_000_000), _gpu("CUDA1", 20_000_000)]
    with pytest.raises(EngineError) as caught:
        fitted(path, settings, cards)
    message = str(caught.value)
    start = (
        r"Demo-Q4_K_M\.gguf with 2048 tokens of f16 KV cache does not fit: CUDA\d would hold [\d.]+ MiB and has room"
    )
    assert re.match(start, message), message
    longest, layers = re.search(r"--context (\d+) \(", message), re.search(r"--gpu-layers (\d+) \(", message)
    assert longest is not None, message
    assert layers is not None, message
    fitted(path, replace(settings, n_ctx=int(longest[1])), cards)
    fitted(path, replace(settings, n_gpu_layers=int(layers[1])), cards)
    for more in (replace(settings, n_ctx=int(longest[1]) + 256), replace(settings, n_gpu_layers=int(layers[1]) + 1)):
        with pytest.raises(EngineError):
            fitted(path, more, cards)
    with pytest.raises(EngineError, match=r"take a smaller level: its weights alone are 5\.8 MiB"):
        fitted(path, settings, [_gpu("CUDA0", 1000), _gpu("CUDA1", 1000)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split_mode": "row"}, "--split-mode row is not known; take layer or tensor"),
        ({"split_mode": "tensor", "kv_type": "q8_0"}, "--split-mode tensor needs a KV cache that is not quantized"),
        ({"split_mode": "tensor", "n_gpu_layers": 5}, "--split-mode tensor needs all layers on the GPUs"),
        (
            {"split_mode": "tensor", "tensor_split": (1.0, 3.0)},
            "here attention has at most 2, and these shares leave one without",
        ),
        (
            {"tensor_split": (1.0, 2.0, 3.0)},
            "--tensor-split 1,2,3 must give each of the 2 devices a share: CUDA0, CUDA1",
        ),
        ({"tensor_split": (0.0, 0.0)}, "--tensor-split 0,0 must give each"),
        ({"main_gpu": 2}, "--main-gpu 2 is none of the devices, which count from 0: CUDA0, CUDA1"),
        ({"main_gpu": 0, "split_mode": "tensor"}, "leave out --split-mode and --tensor-split"),
        ({"main_gpu": 0, "tensor_split": (1.0, 1.0)}, "leave out --split-mode and --tensor-split"),
    ],
)
def test_what_cannot_be_split_so_is_refused_before_loading(
    settings: dict[str, Any], message: str, demo_levels: dict[str, Path]
) -> None:
    cards = [_gpu("CUDA0", GIB), _gpu("CUDA1", GIB)]
    with pytest.raises(EngineError, match=re.escape(message)):
        fitted(demo_levels["Q8_0"], EngineSettings(n_ctx=512, **settings), cards)


def test_without_a_gpu_there_is_nothing_to_choose(demo_levels: dict[str, Path]) -> None:
    path = demo_levels["Q8_0"]
    with pytest.raises(EngineError, match="--split-mode tensor splits over GPUs, and there are none"):
        fitted(path, EngineSettings(n_ctx=512, split_mode="tensor"), [])
    with pytest.raises(EngineError, match="--split-mode tensor needs two GPUs, and CUDA0 is the only one"):
        fitted(path, EngineSettings(n_ctx=512, split_mode="tensor"), [_gpu("CUDA0", GIB)])
    with pytest.raises(EngineError, match="--main-gpu 0 is none of the devices, which count from 0: no GPU"):
        fitted(path, EngineSettings(n_ctx=512, main_gpu=0), [])


def test_the_main_gpu_alone_must_hold_the_model(demo_levels: dict[str, Path]) -> None:
    cards = [_gpu("CUDA0", 1000), _gpu("CUDA1", GIB)]
    settings = EngineSettings(n_ctx=512, main_gpu=1)
    assert fitted(demo_levels["Q8_0"], settings, cards) is settings
    with pytest.raises(EngineError, match="CUDA0 would hold"):
        fitted(demo_levels["Q8_0"], replace(settings, main_gpu=0), cards)


def test_parts_of_tensors_are_as_large_as_the_memory(demo_levels: dict[str, Path]) -> None:
    settings = EngineSettings(n_ctx=512, split_mode="tensor", kv_type="bf16")
    cards = [_gpu("CUDA0", GIB), _gpu("CUDA1", GIB), _gpu("RPC0", 2 * GIB)]
    with pytest.raises(EngineError, match="each of 3 devices; here attention has at most 2, and"):
        fitted(demo_levels["Q8_0"], settings, cards)
    assert fitted(demo_levels["Q8_0"], settings, cards[:2]).tensor_split == (1.0, 1.0)


def test_rpc_devices_come_first_as_llama_cpp_orders_them() -> None:
    devices = [Device("CPU", "", "cpu", 1, 1), _gpu("CUDA0", 1), _gpu("CUDA1", 1), _gpu("RPC0", 1)]
    assert [device.name for device in in_llama_order(devices)] == ["RPC0", "CUDA0", "CUDA1"]
