"""The GPUs a plan can be made for, from NVIDIA's data sheets (dense rates, no sparsity)."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One GPU of an 8-GPU HGX host."""

    name: str
    memory: int
    """Bytes that ``nvidia-smi`` reports in all."""
    bf16_flops: float
    """Peak matrix products in bf16, FLOP/s, dense."""
    fp8_flops: float
    """Peak matrix products in FP8, FLOP/s, dense."""
    nvlink: float
    """Bytes/s to the other GPUs of its host, in one direction."""
    network: float
    """Bytes/s to other hosts, in one direction: one 400 Gb/s adapter per GPU (assumed)."""
    capability: tuple[int, int]
    """CUDA compute capability."""


GPUS_PER_HOST = 8
_MIB = 2**20

CARDS: dict[str, Card] = {
    "h100": Card(
        name="H100 SXM 80 GB",
        memory=81559 * _MIB,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        nvlink=450e9,
        network=50e9,
        capability=(9, 0),
    ),
    "h200": Card(
        name="H200 SXM 141 GB",
        memory=143771 * _MIB,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        nvlink=450e9,
        network=50e9,
        capability=(9, 0),
    ),
    "b200": Card(
        name="B200 SXM 180 GB",
        memory=183359 * _MIB,
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        nvlink=900e9,
        network=50e9,
        capability=(10, 0),
    ),
}
