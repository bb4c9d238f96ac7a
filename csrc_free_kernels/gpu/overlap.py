"""Programmatic dependent launch: a kernel starts while the one before it drains (Hopper and later).

`PDL` kernels are launched with `launch_pdl=True` and call `begin` before they touch memory: it lets the next
kernel's programs start and then waits until the kernel before is complete, its writes included.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from csrc_free_kernels.launch import launch_of


@triton.jit
def begin(PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def overlap(device: torch.device) -> dict[str, bool]:
    """Return the launch options of a kernel that calls `begin`; on where the table says that it was faster."""
    on = bool(launch_of("overlap", device, 0).get("on", 0))
    return {"PDL": on, "launch_pdl": on}
