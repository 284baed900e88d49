# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""Random numbers that depend on their keys alone: the same for any number of workers, and after a resume."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import torch

_GOLDEN, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1

Integers = Any
"""An `int`, or a NumPy array of uint64; what is computed of several has their broadcast shape."""
Numbers = Any
"""A `float`, or a NumPy array of float64."""


def sample_generator(seed: int, epoch: int, key: int, stream: str = "") -> torch.Generator:
    """A CPU generator for what draws from nothing else; its state is a well-mixed function of the arguments.

    Streams of different names are independent of each other.
    """
    return torch.Generator().manual_seed(_digest(f"{seed}/{epoch}/{key}/{stream}") >> 1)


def sample_state(seed: int, epoch: Integers, key: Integers, view: Integers = 0) -> Integers:
    """Where the random numbers of a view of a sample start, for [`uniform`].

    Args:
        seed: Of the run.
        epoch, key, view: From 0, below 2^32; `key` is the sample's index, or a checksum of it.
    """
    return _mix(_mix(_start(seed) + ((((epoch << 32) | key) * _GOLDEN) & _MASK)) + ((view * _GOLDEN) & _MASK))


def uniform(state: Integers, position: int | range) -> Numbers:
    """Number `position` (from 0) after a state: uniform in [0, 1), a multiple of 2^-24, which float32 can hold.

    SplitMix64 (Steele et al. 2014). Any position costs the same, so that a sample computes only what it uses, and NumPy
    computes a batch's at once. A `range` of n positions gives `(n,)` of one state, `(B, n)` of states `(B, 1)`.
    """
    return (_mix(state + _steps(position)) >> 40) * 2.0**-24


@functools.cache
def _steps(position: int | range) -> Integers:
    """What SplitMix64 has added to its state at a position."""
    if isinstance(position, range):
        return uint64([_steps(one) for one in position])
    return ((position + 1) * _GOLDEN) & _MASK


def _mix(z: Integers) -> Integers:
    """SplitMix64's output function."""
    if isinstance(z, int):  # Python's integers do not overflow, and NumPy's cost less without the masks
        z &= _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    else:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@functools.cache
def _start(seed: int) -> int:
    return _digest(f"{seed}/sample")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uint64(values: Any) -> np.ndarray:
    """Values as the functions above take arrays."""
    return np.asarray(values, dtype=np.uint64)
