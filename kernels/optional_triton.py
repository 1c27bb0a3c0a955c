"""Triton, or where it is not installed (there is none for macOS and Windows) what lets the files of kernels import.

The ops' implementations for CPUs need no Triton.
"""

from __future__ import annotations

from typing import Any, NoReturn

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ModuleNotFoundError:

    class _NoTriton:
        """What the files use on import; anything else belongs to a launch."""

        __version__ = "0"

        @staticmethod
        def jit(kernel: Any, **options: Any) -> Any:
            return kernel

        @staticmethod
        def constexpr(value: Any) -> Any:
            return value

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("__"):
                raise AttributeError(name)
            raise ImportError("triton is not installed, which the kernels for GPUs need; install it, or use a CPU")

    triton = tl = _NoTriton()
    gdc_launch_dependents = gdc_wait = None

# Options of every launch: one instruction multiplies and adds, which Triton 3.10 does only where it is asked to.
FUSED = {"enable_fp_fusion": True}

__all__ = ["FUSED", "gdc_launch_dependents", "gdc_wait", "tl", "triton"]
