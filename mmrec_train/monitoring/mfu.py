"""Model FLOPs utilisation: the share of the hardware's peak arithmetic that the model's arithmetic used."""

import re
from typing import NamedTuple

TERA = 1e12


class Peak(NamedTuple):
    """Peak dense rates of one device in TFLOP/s: `half` for bf16 and fp16 matrix units, `single` for fp32."""

    device: str  # a regular expression for the name that torch.cuda.get_device_name gives
    half: float
    single: float
    source: str


# Dense rates: datasheets often print the rate for 2:4 sparse matrices, which is twice as high. `single` is
# plain fp32, without TF32, because PyTorch multiplies fp32 matrices so by default. The first match counts.
PEAKS = (
    Peak(r"\bGB200\b", 2500, 80, "NVIDIA GB200 NVL72 datasheet"),
    Peak(r"\bB200\b", 2250, 75, "NVIDIA HGX B200 datasheet"),
    Peak(r"\bH200 NVL\b", 835.5, 60, "NVIDIA H200 datasheet"),
    Peak(r"\bG?H200\b", 989.4, 66.9, "NVIDIA H200 datasheet, H100 architecture whitepaper (same chip)"),
    Peak(r"\bH100 NVL\b", 835.5, 60, "NVIDIA H100 NVL datasheet"),
    Peak(r"\bH100 PCIe\b", 756, 51.2, "NVIDIA H100 architecture whitepaper"),
    Peak(r"\bH[18]00\b", 989.4, 66.9, "NVIDIA H100 architecture whitepaper"),
    Peak(r"\bA[18]00\b", 312, 19.5, "NVIDIA A100 datasheet"),
    Peak(r"\bL40S\b", 362.05, 91.6, "NVIDIA L40S datasheet"),
    Peak(r"\bL4\b", 121, 30.3, "NVIDIA L4 datasheet"),
    Peak(r"\bA10\b", 125, 31.2, "NVIDIA A10 datasheet"),
    Peak(r"\bMI300X\b", 1307.4, 163.4, "AMD Instinct MI300X datasheet"),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak dense FLOP/s of one device for matrix products in `dtype` ("bf16", "fp16" or "fp32").

    None where it is not known: a CPU, a device that is not in `PEAKS`, a slice of a GPU (MIG).
    """
    assert dtype in ("bf16", "fp16", "fp32"), dtype
    if "MIG" in device_name:
        return None
    for peak in PEAKS:
        if re.search(peak.device, device_name):
            return (peak.single if dtype == "fp32" else peak.half) * TERA
    return None


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation, a fraction: tokens_per_second × flops_per_token / peak_flops.

    tokens_per_second: of all ranks together.
    flops_per_token: of one training step, forward and backward, as the model's accounting counts them.
        What is computed again for activation checkpointing is not in it: spending that shows as a lower MFU.
    peak_flops: of all devices together; None (unknown) gives None.
    """
    return None if peak_flops is None else tokens_per_second * flops_per_token / peak_flops
