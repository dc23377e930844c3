"""Checkpoints to measure with: safetensors of any shape, of true BF16 weights or of zeros that take no room on disk.

The weights are normal with the spread that trained ones have (sigma 0.02), the same in every run and for any number of
threads: each block of a tensor has a generator of its own, seeded by the two numbers. Vocabulary and settings are the
demo's; a vocabulary that is larger than the tokenizer's is padded by the converter.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.naming import hugging_face_name
from quant.reading.checkpoint import open_checkpoint
from quant.recipes import TensorSpec, tensors
from runtime.levels import Shape

DEMO = Path(__file__).parent.parent / "quant" / "demo" / "model"

SIGMA = 0.02

BLOCK = 1 << 22
"""Weights of one generator."""

WEIGHTS_FILE = "model.safetensors"


def random_checkpoint(folder: Path, shape: Shape, threads: int, *, tokenizer: Path | None = None) -> Path:
    """A folder of random weights; one that is there already, whole and of this shape, is left as it is.

    `tokenizer` is a SentencePiece file; None takes the demo's.
    """
    path = folder / WEIGHTS_FILE
    header, places = _header(shape)
    n_bytes = len(header) + 2 * sum(spec.n_elements for spec in tensors(shape))
    if path.is_file() and path.stat().st_size == n_bytes:
        with path.open("rb") as there:
            if there.read(len(header)) == header:
                return folder
    _small_files(folder, shape)
    if tokenizer is not None:
        shutil.copy(tokenizer, folder / "tokenizer.model")
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(header)
        file.truncate(n_bytes)
        descriptor = file.fileno()

        def fill(piece: tuple[int, int, int, int]) -> None:
            number, block, count, offset = piece
            data = _bits(np.random.default_rng((number, block)), count)
            written = os.pwrite(descriptor, data.data, len(header) + offset)
            assert written == data.nbytes, (written, data.nbytes)

        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(fill, _pieces(places)):
                pass
    partial.replace(path)
    return folder


def empty_checkpoint(folder: Path, shape: Shape) -> Path:
    """A folder of zeros, in a file with a hole where its weights would be."""
    _small_files(folder, shape)
    header, _ = _header(shape)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * sum(spec.n_elements for spec in tensors(shape)))
    return folder


def padded_demo(folder: Path, n_ff: int, n_layers: int) -> Path:
    """The demo with a wider FFN and more layers, all that is new of zeros: it says the same, and takes longer."""
    demo = open_checkpoint(DEMO)
    shape = replace(demo.shape, n_ff=n_ff, n_layers=n_layers)
    empty_checkpoint(folder, shape)
    header, places = _header(shape)
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        for spec, offset in places:
            if (stored := demo.tensors.get(spec.name)) is None:
                continue
            assert stored.path is not None
            bits = np.fromfile(stored.path, np.uint16, math.prod(stored.shape), offset=stored.offset)
            padding = [(0, wanted - there) for wanted, there in zip(spec.shape, stored.shape, strict=True)]
            file.seek(len(header) + offset)
            file.write(np.pad(bits.reshape(stored.shape), padding).tobytes())
    return folder


def checkpoint_bytes(folder: Path) -> int:
    """Of the weight files."""
    return sum(path.stat().st_size for path in weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _small_files(folder: Path, shape: Shape) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    config: dict[str, Any] = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    config |= {
        "num_hidden_layers": shape.n_layers,
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_heads_kv,
        "head_dim": shape.head_dim,
        "vocab_size": shape.n_vocab,
        "tie_word_embeddings": shape.tied,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _header(shape: Shape) -> tuple[bytes, list[tuple[TensorSpec, int]]]:
    """A safetensors header, and each tensor's offset behind it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "made_by": f"bise benchmark, sigma {SIGMA}"}}
    places = []
    position = 0
    for spec in tensors(shape):
        end = position + 2 * spec.n_elements
        name = hugging_face_name(spec.name)
        entries[name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [position, end]}
        places.append((spec, position))
        position = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _pieces(places: list[tuple[TensorSpec, int]]) -> Iterator[tuple[int, int, int, int]]:
    """Number of the tensor, of the block, weights in it, bytes before it."""
    for number, (spec, offset) in enumerate(places):
        for block, first in enumerate(range(0, spec.n_elements, BLOCK)):
            yield number, block, min(BLOCK, spec.n_elements - first), offset + 2 * first


def _bits(generator: np.random.Generator, count: int) -> NDArray[np.uint16]:
    """Normal numbers as BF16, rounded to nearest."""
    numbers = generator.standard_normal(count, np.float32)
    numbers *= np.float32(SIGMA)
    bits = numbers.view(np.uint32)
    bits += np.uint32(0x8000)
    bits >>= np.uint32(16)
    return bits.astype(np.uint16)
