"""Triton's interpreter, made right, and more than twice as fast: most of its time is Python around numpy."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


def settle() -> None:
    repair_bf16()
    patch_once()
    remember_types()
    shorten_arithmetic()


def repair_bf16() -> None:
    """Triton's interpreter rounds to bfloat16 towards zero, where GPUs round to the nearest, and multiplies the bit
    patterns of bfloat16 operands of tl.dot; give it floats."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(h: Any) -> Any:
        if h.dtype.scalar != tl.bfloat16:
            return h
        return interpreter.TensorHandle((h.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any, **kwargs: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *args, **kwargs)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return widened(src)
        if kinds != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = src.data.view(np.uint32)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return interpreter.TensorHandle(
            np.where(np.isnan(src.data), 0x7FC0, nearest).astype(np.uint16), dst_type.scalar
        )

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def patch_once() -> None:
    """Triton's interpreter patches its language at every launch, and again at every call of a device function, which
    takes a third of the time: what a launch has not patched, functions of triton.language.core, stays so for good."""
    patched = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not patched and any(value is core for value in self.fn.__globals__.values()):
            patched.append(interpreter._patch_lang(self.fn))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise interpreter.InterpreterError(repr(e)) from e

    interpreter.InterpretedFunction.__call__ = call


def remember_types() -> None:
    """An operation makes several types and tensors, all of a few shapes: what they hold of a shape is made once."""
    numpy_type, block_type = interpreter._get_np_dtype, core.block_type.__init__
    numpy_types: dict[str, Any] = {}
    shapes: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    scalar = core.tuple([]), core.constexpr(1)

    def get_np_dtype(of: Any) -> Any:
        name = of.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(of.scalar)
        return numpy_types[name]

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (*shape,)
        if sizes not in shapes:
            block_type(self, element_ty, shape)
            constants = core.tuple([core.constexpr(s) for s in self.shape]), core.constexpr(self.numel)
            shapes[sizes] = self.shape, self.numel, str(self.shape), constants
        self.element_ty = element_ty
        self.shape, self.numel, said, self.constants = shapes[sizes]
        self.name = f"<{said}, {element_ty}>"

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.constants if type.is_block() else scalar

    interpreter._get_np_dtype = get_np_dtype
    core.block_type.__init__, core.tensor.__init__ = init_block_type, init_tensor


class Settled(interpreter.TritonSemantic):  # type: ignore[misc,type-arg]
    """Operands of one shape need no broadcast; and whether a sum, difference or product of signed integers overflows,
    which the interpreter computes by eight operations of its own and then says to nobody, is one operation of
    numpy, and an error. Unsigned integers are meant to wrap."""

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and a.shape is b.shape:
            return lhs, rhs
        return super().broadcast_impl_value(lhs, rhs)

    def binary_op_sanitize_overflow_impl(self, lhs: Any, rhs: Any, binary_op: Any) -> None:
        kind = lhs.type.scalar
        if not kind.is_int_signed() or not 8 <= kind.int_bitwidth < 64:
            return
        exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__]
        result = exact(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        most = 2 ** (kind.int_bitwidth - 1)
        assert ((-most <= result) & (result < most)).all(), f"{kind} overflows in {binary_op.__name__}"


def shorten_arithmetic() -> None:
    """For all operations: Triton 3.6 makes an object of the class for each of them, 3.7 has one."""
    interpreter.TritonSemantic = Settled
    if hasattr(interpreter, "interpreter_semantic"):
        interpreter.interpreter_semantic.__class__ = Settled
