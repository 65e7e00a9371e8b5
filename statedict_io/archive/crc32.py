"""Arithmetic on finished CRC-32s, for the Python backend; csrc/checksum/crc32_shift.cpp says why it works."""

from __future__ import annotations

import functools

_POLYNOMIAL = 0xEDB88320
_ONE = 0x80000000  # x^0: bit-reflected


def shift(crc: int, nbytes_after: int) -> int:
    """What a piece with ``crc`` adds to the CRC of a record in which ``nbytes_after`` bytes follow it."""
    if crc == 0 or nbytes_after == 0:
        return crc
    return _multiply(crc, _power(nbytes_after))


def shifter(nbytes: int) -> list[list[int]]:
    """Tables for many shifts over one distance; see :func:`shift_by`."""
    power = _power(nbytes)
    tables = []
    for byte in range(4):
        products = [0] * 256
        for bit in range(8):
            product = _multiply(1 << (8 * byte + bit), power)
            for value in range(1 << bit):
                products[value | 1 << bit] = products[value] ^ product
        tables.append(products)
    return tables


def shift_by(tables: list[list[int]], crc: int) -> int:
    first, second, third, fourth = tables
    return first[crc & 0xFF] ^ second[crc >> 8 & 0xFF] ^ third[crc >> 16 & 0xFF] ^ fourth[crc >> 24]


def _multiply(a: int, b: int) -> int:
    """Of polynomials, modulo the CRC's."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(1 << 12)
def _power(nbytes: int) -> int:
    """x^(8 nbytes)"""
    power = _ONE
    for exponent in range(nbytes.bit_length()):
        if nbytes >> exponent & 1:
            power = _multiply(power, _square_power(exponent))
    return power


@functools.cache
def _square_power(exponent: int) -> int:
    """x^(8 * 2^exponent)"""
    power = _ONE >> 8
    for _ in range(exponent):
        power = _multiply(power, power)
    return power
