"""What the machine does well, which decides how the rooms compute."""

from __future__ import annotations

import torch


def fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (bf16_tiles() or bool(torch.cpu._is_avx512_bf16_supported()))


def bf16_tiles() -> bool:
    """Whether the processor multiplies bf16 in tiles of 16 rows (Intel's AMX), which small operands leave empty."""
    return bool(torch.cpu._is_amx_tile_supported())
