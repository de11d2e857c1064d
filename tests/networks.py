"""Which networks the suite computes with. Many differ only in widths and depths, which their small
twins do not have: one of each kind in the suite, the others in `make long`.
"""

from __future__ import annotations

import pytest

from segfleet.models.registry import specs

# test_conformance.py looks whether a small twin is made of the same modules as that of its like.
LIKE = {
    "mednext_m3": "mednext_s3",
    "mednext_b3": "mednext_s3",
    "mednext_l3": "mednext_s3",
    "mednext_m5": "mednext_s5",
    "mednext_b5": "mednext_s5",
    "mednext_l5": "mednext_s5",
    "nlie_unet_s": "nlie_unet_t",
    "nlie_unet_b": "nlie_unet_t",
    "nlie_unet_l": "nlie_unet_t",
    "primus_v3_m": "primus_v3_s",
    "rec_unet_em": "rec_unet",
    "unet_lite_ultralight": "unet_lite_depthwise",
    "unet_lite_se_depthwise_r32": "unet_lite_se_depthwise",
}


def each_network() -> list:
    """All names, as pytest's parameters; a new one is in the suite."""
    return [
        pytest.param(name, marks=pytest.mark.long) if name in LIKE else name for name in specs()
    ]
