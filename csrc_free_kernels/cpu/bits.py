"""16-bit floats for numba, which has neither bf16 nor fp16 on the CPU: they travel as uint16 bit patterns.

`as_numpy` gives the array that a kernel takes and a code that says how to decode it; `decode` turns one element into
float32 and `encode` turns a float32 back (round to nearest even), both inside numba.
"""

import numba as nb
import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic

FP32, BF16, FP16 = 0, 1, 2
CODES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}
FASTMATH = {"reassoc", "contract", "nsz"}  # never nnan or ninf: merges rely on -inf


def as_numpy(t: torch.Tensor) -> np.ndarray:
    """View a CPU tensor as numpy without copying: float32 as it is, 16-bit floats as uint16."""
    return (
        t.detach().view(torch.uint16).numpy()
        if t.dtype in (torch.bfloat16, torch.float16)
        else t.detach().numpy()
    )


def code_of(t: torch.Tensor) -> int:
    """Return the decode code of the tensor's dtype."""
    if t.dtype not in CODES:
        raise ValueError(f"the CPU kernels take float32, bfloat16 or float16, not {t.dtype}")
    return CODES[t.dtype]


@intrinsic
def _bits_to_float(typingctx, x):
    sig = types.float32(types.uint32)

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return sig, codegen


@intrinsic
def _float_to_bits(typingctx, x):
    sig = types.uint32(types.float32)

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return sig, codegen


@nb.njit(inline="always")
def decode(x, code):
    """One stored element -> float32."""
    if code == FP32:
        return np.float32(x)
    if code == BF16:
        return _bits_to_float(np.uint32(np.uint32(x) << np.uint32(16)))
    # fp16: shift exponent and mantissa into place, rescale by 2^112 (handles subnormals), restore inf and nan
    u = np.uint32(x)
    sign = (u & np.uint32(0x8000)) << np.uint32(16)
    magnitude = u & np.uint32(0x7FFF)
    if magnitude >= np.uint32(0x7C00):
        return _bits_to_float(
            sign | np.uint32(0x7F800000) | ((magnitude & np.uint32(0x3FF)) << np.uint32(13))
        )
    value = _bits_to_float(magnitude << np.uint32(13)) * np.float32(5.192296858534828e33)
    return -value if sign else value


@nb.njit(inline="always")
def encode_bf16(x):
    """float32 -> bf16 bits, round to nearest even."""
    u = _float_to_bits(np.float32(x))
    if (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@nb.njit(inline="always")
def encode_fp16(x):
    """float32 -> fp16 bits, round to nearest even."""
    u = _float_to_bits(np.float32(x))
    sign, magnitude = (u >> np.uint32(16)) & np.uint32(0x8000), u & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        return np.uint16(0x7E00)
    if magnitude >= np.uint32(0x477FF000):  # 65520 and more round to infinity
        return np.uint16(sign | np.uint32(0x7C00))
    if magnitude < np.uint32(0x38800000):  # subnormal: adding 0.5 leaves its bits, rounded, at the bottom
        return np.uint16(
            sign | (_float_to_bits(np.abs(np.float32(x)) + np.float32(0.5)) - np.uint32(0x3F000000))
        )
    rounded = (
        magnitude + np.uint32(0xFFF) + ((magnitude >> np.uint32(13)) & np.uint32(1)) - np.uint32(0x38000000)
    )
    return np.uint16(sign | (rounded >> np.uint32(13)))
