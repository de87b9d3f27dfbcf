import pytest

from mmrec_train.monitoring import mfu, peak_flops


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 66.9e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 NVL", "bf16", 835.5e12),
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA H200 NVL", "bf16", 835.5e12),
        ("NVIDIA GH200 480GB", "bf16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5e12),
        ("NVIDIA A800-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA B200", "bf16", 2250e12),
        ("NVIDIA GB200", "bf16", 2500e12),
        ("NVIDIA L40S", "bf16", 362.05e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA A10", "bf16", 125e12),
        ("AMD Instinct MI300X", "bf16", 1307.4e12),
        ("NVIDIA A10G", "bf16", None),  # another chip than the A10
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),  # a seventh of a chip
        ("NVIDIA GeForce RTX 4090", "bf16", None),
        ("Intel(R) Xeon(R) Platinum 8481C", "bf16", None),
        ("cpu", "fp32", None),
    ],
)
def test_peak_of_a_device(device: str, dtype: str, expected: float | None) -> None:
    assert peak_flops(device, dtype) == pytest.approx(expected)


def test_mfu_is_the_share_of_the_peak() -> None:
    # 50 000 tokens/s of 6 × 1e9 FLOPs each are 3e14 FLOP/s.
    assert mfu(50_000, 6e9, 989.4e12) == pytest.approx(0.30321, abs=1e-5)
    assert mfu(2 * 50_000, 6e9, 2 * 989.4e12) == mfu(50_000, 6e9, 989.4e12)


def test_mfu_is_unknown_where_the_peak_is() -> None:
    assert mfu(50_000, 6e9, None) is None
