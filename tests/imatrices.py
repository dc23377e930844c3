"""Importance matrices as files, written by gguf and by hand, and small models to use them on."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from quant.recipes import TensorSpec, tensors
from runtime.levels import Shape
from tests.gguf_files import bare_model

KEYS = {"imatrix.chunk_count": 20, "imatrix.chunk_size": 512}


def write_imatrix(
    path: Path,
    sums: Mapping[str, NDArray[np.float32]],
    counts: Mapping[str, Sequence[float]] | None = None,
    datasets: Sequence[str] = ("prose.txt",),
    keys: Mapping[str, int] = KEYS,
    general_type: str | None = "imatrix",
    totals: Mapping[str, NDArray[np.float32]] | None = None,
) -> Path:
    """A file as llama-imatrix writes it, by gguf's own writer: `sums` of squares, and how many were added (1).

    `totals` are the plain sums of some or all of them.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].clear()  # llama-imatrix names no architecture
    if general_type is not None:
        writer.add_type(general_type)
    writer.add_array(gguf.Keys.IMatrix.DATASETS, list(datasets))
    for key, number in keys.items():
        writer.add_uint32(key, number)
    for name, values in sums.items():
        added = np.array((counts or {}).get(name, [1]), np.float32)
        writer.add_tensor(f"{name}.in_sum2", values.reshape(added.size, -1))
        writer.add_tensor(f"{name}.counts", added.reshape(-1, 1))
    for name, values in (totals or {}).items():
        writer.add_tensor(f"{name}.in_sum", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy_imatrix(entries: Mapping[str, tuple[int, NDArray[np.float32]]], tail: bytes = b"") -> bytes:
    """The bytes of a `.dat` file: entries of calls and sums, and what follows them."""
    parts = [struct.pack("<i", len(entries))]
    for name, (n_calls, values) in entries.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", n_calls, len(values))]
        parts.append(values.astype("<f4").tobytes())
    return b"".join([*parts, tail])


def legacy_tail(n_chunks: int, dataset: str) -> bytes:
    return struct.pack("<ii", n_chunks, len(dataset.encode())) + dataset.encode()


def random_importance(shape: Shape, seed: int = 5) -> dict[str, NDArray[np.float32]]:
    """Mean squares for every matrix of the layers, as uneven as real ones: a few columns matter most."""
    rng = np.random.default_rng(seed)
    specs = [spec for spec in tensors(shape) if spec.name.startswith("blk.") and not spec.is_vector]
    return {spec.name: rng.lognormal(0, 2, spec.row_length).astype(np.float32) for spec in specs}


def random_model(shape: Shape, seed: int = 7) -> dict[TensorSpec, NDArray[np.uint16]]:
    """Random BF16 weights as bits, (rows, row_length)."""
    rng = np.random.default_rng(seed)
    weights = {spec: 0.1 * rng.standard_normal(spec.shape) for spec in tensors(shape)}
    return {spec: (data.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for spec, data in weights.items()}


def write_model(path: Path, shape: Shape, model: Mapping[TensorSpec, NDArray[np.uint16]]) -> Path:
    """A BF16 GGUF of these weights, by gguf's own writer: all that llama_model_quantize asks for."""
    with bare_model(path, shape, gguf.LlamaFileType.MOSTLY_BF16) as writer:
        for spec, bits in model.items():
            if spec.is_vector:
                writer.add_tensor(spec.name, widened(bits))
            else:
                writer.add_tensor(spec.name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    return path


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """BF16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
