"""Selective scan (Mamba-1) for every device, and the Mamba layer on it: drop-in for `mamba_ssm`'s,
same names and state-dict keys."""

from segfleet.models.scan import op as _op  # noqa: F401 - registers torch.ops.segfleet.selective_scan
from segfleet.models.scan.interface import selective_scan_fn
from segfleet.models.scan.mamba import Mamba
from segfleet.models.scan.reference import selective_scan_ref

__all__ = ["Mamba", "selective_scan_fn", "selective_scan_ref"]
