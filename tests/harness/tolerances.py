"""The one table of tolerances of all kernel tests, on every device. Copies are compared exactly."""

from __future__ import annotations

import torch

TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 2e-2},
}
"""dtype of the weights -> of ``torch.testing.assert_close`` against the reference in float32."""
