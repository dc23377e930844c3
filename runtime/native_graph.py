"""What a context computes, node by node: watch the products, read what goes into them, read and replace weights.

An `Observer` is given to `Context`. While a batch is decoded it is asked of every node of the compute graph whether it
wants it; those are then shown to it once they have been computed. Views are valid only inside that call, except those
of weights, which live as long as their model. Dimensions are NumPy's: the last one is contiguous. Knows nothing of
models or of what is done with the numbers.

Source: ggml/include/ggml.h and `ggml_backend_sched_compute_splits` of ggml/src/ggml-backend.cpp, llama.cpp 0c1e57098.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError
from runtime.ggml import GgmlType
from runtime.interrupts import Interrupts
from runtime.native import function, lib
from runtime.wheel import VERSION as WHEEL_VERSION

_N_DIMS, _N_SOURCES, _NAME_BYTES, _PARAMETER_BYTES = 4, 10, 64, 64  # GGML_MAX_DIMS, _SRC, _NAME, _OP_PARAMS
_TENSOR_BYTES, _OBJECT_BYTES = 336, 32  # struct ggml_tensor, struct ggml_object
_USAGE_WEIGHTS = 1  # enum ggml_backend_buffer_usage, ggml-backend.h
_DEVICE_CPU = 0  # enum ggml_backend_dev_type, ggml-backend.h


class _NativeTensor(ctypes.Structure):
    """`struct ggml_tensor`."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * _N_DIMS),
        ("nb", ctypes.c_size_t * _N_DIMS),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_char * _PARAMETER_BYTES),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * _N_SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * _NAME_BYTES),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


def _check_structure() -> None:
    """A tensor in memory must have the fields that are read here, or what is read is garbage."""
    theirs = function("ggml_tensor_overhead", ctypes.c_size_t)() - _OBJECT_BYTES
    if ctypes.sizeof(_NativeTensor) != _TENSOR_BYTES or theirs != _TENSOR_BYTES:
        raise EngineError(
            f"ggml's ggml_tensor has {theirs} bytes, not {_TENSOR_BYTES}: this is not the llama.cpp of "
            f"llama-cpp-python {WHEEL_VERSION}; run `make setup` again"
        )


_check_structure()

_op_name = function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
_n_bytes = function("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p)
_is_contiguous = function("ggml_is_contiguous", ctypes.c_bool, ctypes.c_void_p)
_is_host = function("ggml_backend_buffer_is_host", ctypes.c_bool, ctypes.c_void_p)
_buffer_name = function("ggml_backend_buffer_name", ctypes.c_char_p, ctypes.c_void_p)
_buffer_type = function("ggml_backend_buffer_get_type", ctypes.c_void_p, ctypes.c_void_p)
_buffer_usage = function("ggml_backend_buffer_get_usage", ctypes.c_int, ctypes.c_void_p)
_device = function("ggml_backend_buft_get_device", ctypes.c_void_p, ctypes.c_void_p)
_device_type = function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
_get = function("ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_set = function("ggml_backend_tensor_set", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)


@cache
def _operation(number: int) -> str:
    name: bytes = _op_name(number)
    return name.decode()


class Tensor:
    """One tensor of a compute graph, or a weight."""

    __slots__ = ("_native", "address")

    def __init__(self, address: int) -> None:
        self.address = address
        """Of the native structure: the same tensor has the same address while one batch is computed."""
        self._native = _NativeTensor.from_address(address)

    @property
    def name(self) -> str:
        """Without what the scheduler puts around the names of copies: `CUDA0#blk.0.attn_k.weight#0`."""
        parts = self._raw_name.split("#")
        return parts[1] if len(parts) > 1 else parts[0]

    @property
    def is_copy(self) -> bool:
        """The scheduler's copy, on another device, of the tensor of that name."""
        return "#" in self._raw_name

    @property
    def operation(self) -> str:
        """What computes it, as ggml names it: `MUL_MAT`; `NONE` for a weight."""
        return _operation(self._native.op)

    @property
    def type(self) -> int:
        """`enum ggml_type`; runtime.ggml knows those that Bise uses."""
        return int(self._native.type)

    @property
    def shape(self) -> tuple[int, ...]:
        """Without leading dimensions of 1: a matrix of one row is a vector."""
        dims = list(self._native.ne)
        while len(dims) > 1 and dims[-1] == 1:
            dims.pop()
        return tuple(reversed(dims))

    @property
    def n_bytes(self) -> int:
        """From its first byte to its last, gaps of a view among them."""
        return int(_n_bytes(self.address))

    @property
    def is_weight(self) -> bool:
        """Whether it is part of a loaded model."""
        buffer = self._buffer
        return buffer is not None and self._native.op == 0 and _buffer_usage(buffer) == _USAGE_WEIGHTS

    @property
    def is_host(self) -> bool:
        """Whether its bytes can be read where they are, without a copy from a device."""
        buffer = self._buffer
        return buffer is not None and bool(_is_host(buffer))

    def floats(self) -> NDArray[np.float32]:
        """The values of a float32 tensor, in its shape, which need not be contiguous.

        A view where they lie in the host's memory: valid as long as the tensor, and not to be written to.
        """
        assert self.type == GgmlType.F32, (self.name, self.type)
        shape = self.shape
        strides = tuple(reversed(self._native.nb[: len(shape)]))
        n_bytes = self.n_bytes
        if self.is_host:
            data = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(self._native.data))
        else:
            data = self._fetched(n_bytes)
        values = np.ndarray(shape, np.float32, data, strides=strides)
        values.flags.writeable = False
        return values

    def read(self) -> NDArray[np.uint8]:
        """All its bytes, as they would stand in a GGUF file, (n_bytes,). Raises EngineError for a repacked weight."""
        self._check_plain()
        return self._fetched(self.n_bytes)

    def write(self, data: NDArray[np.uint8]) -> None:
        """Replace all bytes (n_bytes,), which the next decode computes with.

        Only of a weight of a model that was opened `writable`: others are repacked, or lie in a file mapped for reading
        alone. Raises EngineError for such a weight, and for a copy, since the next batch makes it anew.
        """
        self._check_plain()
        if self.is_copy or _buffer_name(self._buffer).endswith(b"_Mapped"):
            raise EngineError(f"{self.name} cannot be replaced where it lies; open the model writable")
        assert data.nbytes == self.n_bytes, (self.name, data.nbytes, self.n_bytes)
        assert data.flags.c_contiguous
        _set(self.address, data.ctypes.data, 0, data.nbytes)

    @property
    def _raw_name(self) -> str:
        name: bytes = self._native.name
        return name.decode("utf-8", "replace")

    @property
    def _buffer(self) -> int | None:
        view_of = self._native.view_src
        buffer: int | None = _NativeTensor.from_address(view_of).buffer if view_of else self._native.buffer
        return buffer

    def _fetched(self, n_bytes: int) -> NDArray[np.uint8]:
        data = np.empty(n_bytes, np.uint8)
        _get(self.address, data.ctypes.data, 0, n_bytes)
        return data

    def _check_plain(self) -> None:
        """The CPU's repacking buffers cannot give back what was put into them: they have no `get_tensor`."""
        assert _is_contiguous(self.address), self.name
        if not self.is_host:
            device = _device(_buffer_type(self._buffer))
            if device and _device_type(device) == _DEVICE_CPU:
                raise EngineError(f"{self.name} is kept in another layout than the file's; open the model writable")


class Node(Tensor):
    """A tensor that the graph computes, with what it is computed of."""

    __slots__ = ()

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What it is computed of. Of `MUL_MAT`: the weight, then what it is multiplied with."""
        return tuple(Tensor(address) for address in self._native.src if address)

    def source(self, i: int) -> Tensor:
        """One of them, which must be there."""
        return Tensor(self._native.src[i])


class Observer(Protocol):
    """Watches what is computed. Whatever it raises ends the decode, and comes out of `Context.decode`."""

    def wants(self, node: Node) -> bool:
        """Whether to show it this node once it is computed. Now its data are not there yet.

        Called for every node of every ubatch. Each yes costs: the nodes before it are computed and waited for.
        """

    def observe(self, node: Node) -> None:
        """A node it wanted, computed. What it is computed of is still there too."""


class Weights:
    """An observer that finds the weights and wants nothing else."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        """Name → weight, of all that the batches so far were computed with. Valid while the model is open."""

    def wants(self, node: Node) -> bool:
        for source in node.sources:
            if source.is_weight:
                self.found.setdefault(source.name, source)
        return False

    def observe(self, node: Node) -> None:
        raise AssertionError(f"it did not want {node.name}")


class Watch:
    """An observer as the callback that llama.cpp takes. An exception must not go through C: it is kept."""

    def __init__(self, observer: Observer, on_failure: Callable[[], None]) -> None:
        """`on_failure` is called when the observer raises, or at Ctrl-C, to end the decode soon."""
        self._observer = observer
        self._on_failure = on_failure
        self._failure: BaseException | None = None
        self._interrupts = Interrupts(on_failure)
        self.callback: Any = lib.ggml_backend_sched_eval_callback(self._call)  # a reference: C keeps the pointer alone

    def _call(self, address: int, ask: bool, _: object) -> bool:
        if self.stopped:
            return False
        try:
            if ask:
                return bool(self._observer.wants(Node(address)))
            self._observer.observe(Node(address))
        except BaseException as failure:
            self._failure = failure
            self._on_failure()
            return False
        return True

    @contextmanager
    def watching(self) -> Iterator[None]:
        """To decode in. At its end it raises what the observer raised, or lets Ctrl-C do what it does elsewhere."""
        self._failure = None
        with self._interrupts.held():
            yield
        if self._failure is not None:
            raise self._failure

    @property
    def stopped(self) -> bool:
        """Whether the last decode was to end early: for an exception, or Ctrl-C."""
        return self._failure is not None or self._interrupts.came
