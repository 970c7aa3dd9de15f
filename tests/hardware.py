"""What this machine can do, for tests that need it."""

import pytest
import torch

PACKS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""oneDNN has kernels for bf16 on this CPU: AVX-512 and its like; on AVX2 products in bf16 are emulated, some 30 times slower."""

needs_fast_bf16 = pytest.mark.skipif(not PACKS_BF16, reason="bf16 is emulated on this CPU")
