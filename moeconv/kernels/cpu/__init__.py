"""Decoding on the CPU: what codecs/ says readably, compiled; bit for bit the same. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from moeconv.kernels.cpu import floats, mxfp4
from moeconv.kernels.cpu.base import Counts, Kernel
from moeconv.kernels.cpu.copies import copy_into, count_nonfinite
from moeconv.kernels.cpu.floats import round_to

__all__ = ["KERNELS", "Counts", "Kernel", "copy_into", "count_nonfinite", "round_to"]

KERNELS: Mapping[str, Kernel] = {"float": floats.decode, "mxfp4": mxfp4.decode}
