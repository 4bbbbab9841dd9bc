"""Random numbers as a function of where a token stands, so that every layout draws the same.

A counter-based generator on int64 tensors: mixing as in "lowbias32" (a 32-bit integer hash with
low bias; the constants are public domain, by C. Wellons). No state and no host.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def mix(number: Tensor) -> Tensor:
    """Hash 32-bit numbers held in int64 (products beyond 64 bits keep their low 32)."""
    number = ((number ^ (number >> 16)) * 0x7FEB352D) & _LOW
    number = ((number ^ (number >> 15)) * 0x846CA68B) & _LOW
    return number ^ (number >> 16)


def uniforms(key: Tensor, place_T: Tensor, columns: int) -> Tensor:
    """Return uniform numbers in (0, 1) that depend on key, place and column alone.

    Args:
        key: [2] int64, 32 random bits each.
        place_T: [T] int64, the places of the tokens, below 2^32.
        columns: C.

    Returns:
        [T, C] float32, multiples of 2^-24 plus half of it.
    """
    column_C = torch.arange(columns, device=place_T.device)
    row_T = mix((place_T & _LOW) ^ key[0])
    number_TC = mix((row_T.unsqueeze(-1) + mix(column_C ^ key[1])) & _LOW)
    return ((number_TC >> 8).to(torch.float32) + 0.5) * 2.0**-24
