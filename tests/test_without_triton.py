"""Where Triton cannot be installed, everything imports and a CPU decodes; nor does it take what only a server does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HIDE = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
for name in ("fastapi", "uvicorn", "openai", "prometheus_client"):
    sys.modules[name] = None
"""
DECODE = """
import torch
from tiny_models import tiny_model
import quantspec
import quantspec.cli.serve
import quantspec.serving.engine
from quantspec.kernels.int4_linear import int4_linear_triton

qs = quantspec.convert(tiny_model("llama"), kv_group_size=16, self_check=False)
ids = torch.arange(3, 43)[None]
print(qs.generate(ids, max_new_tokens=4, eos_token_id=None).shape[1])
qs.plot()
half = torch.ones(1, 64, dtype=torch.bfloat16)
try:
    int4_linear_triton(half, torch.zeros(64, 32, dtype=torch.uint8), torch.ones(2, 64, 2), None)
except ImportError as error:
    print(error)
"""


def test_a_cpu_needs_neither_triton_nor_the_servers_extra():
    """Conversion, decoding and timing run; a launch says what is missing."""
    command = [sys.executable, "-W", "ignore", "-c", HIDE + DECODE]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    length, message = done.stdout.splitlines()
    assert length == "44"
    assert message == "triton is not installed, which the kernels for GPUs need; install it, or use a CPU"
