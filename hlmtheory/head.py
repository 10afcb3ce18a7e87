"""The head of a distribution: its largest entries in order, and all that truncation asks of them.

numpy partitions and sorts plain values an order of magnitude faster than torch on a processor, so
tensors in main memory are read as numpy arrays (the same memory, no copy); on an accelerator the
same formulas run on torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace, is_torch_array

from hlmtheory.domain import Array
from hlmtheory.order import count_up_to, largest, on_accelerator


def check_sizes(low: int, high: int, vocab_size: int) -> None:
    """Raise ValueError unless all sizes, from `low` to `high`, lie in 1..V."""
    if low < 1 or high > vocab_size:
        raise ValueError(f"size = {low if low < 1 else high}: allowed is 1 to V = {vocab_size}")


def tail_level(kept_mass: Array, size: Array | int, vocab_size: int) -> Array:
    """Probability of each token of a uniform tail: (1 - kept mass)/(V - k), 0 for k = V."""
    xp = array_namespace(kept_mass)
    if isinstance(size, int | np.integer):
        level = xp.clip(1.0 - kept_mass, 0.0, None) / max(vocab_size - int(size), 1)
        return level if size < vocab_size else xp.zeros_like(level)
    num_tail = xp.astype(xp.clip(vocab_size - size, 1, None), kept_mass.dtype)
    level = xp.clip(1.0 - kept_mass, 0.0, None) / num_tail
    return xp.where(size >= vocab_size, xp.zeros_like(level), level)


@dataclass(frozen=True)
class Head:
    """The largest entries of each row, falling, with running sums in float64: both (B, M)."""

    values: Array
    prefix: Array
    vocab_size: int

    @staticmethod
    def rows(x: Array) -> Array:
        """`x` (..., V) as (B, V): float32 or float64, a numpy view if it lies in main memory."""
        if "float32" not in str(x.dtype) and "float64" not in str(x.dtype):
            xp = array_namespace(x)
            x = xp.astype(x, xp.float32)  # half precision has no fast sort, and no numpy form
        if is_torch_array(x) and not on_accelerator(x):
            x = x.detach().numpy()
        return x.reshape(-1, x.shape[-1])

    @staticmethod
    def restore(values: Array, x: Array, shape: tuple[int, ...]) -> Array:
        """`values` in the given shape, and in the namespace, precision and place of x."""
        xp = array_namespace(x)
        if is_torch_array(x) and not is_torch_array(values):
            values = xp.asarray(values)
        return xp.astype(xp.reshape(values, shape), x.dtype, copy=False)

    @classmethod
    def of(cls, rows: Array, num: int) -> Head:
        """The `num` largest entries of rows (B, V) as float64."""
        vocab = rows.shape[-1]
        if is_torch_array(rows):
            top = largest(rows, num)[0].double()
            return cls(top, top.cumsum(-1), vocab)
        top = rows if num == vocab else np.partition(rows, vocab - num, axis=-1)[:, vocab - num :]
        top = np.sort(top, axis=-1)[:, ::-1].astype(np.float64)
        return cls(top, np.cumsum(top, axis=-1), vocab)

    def count_above(self, levels: Array) -> Array:
        """How many of each row's entries exceed levels (B, G); the integers (B, G)."""
        rising = array_namespace(levels).flip(self.values, axis=-1)
        return self.values.shape[-1] - count_up_to(rising, levels)

    def kept_mass(self, sizes: Array) -> Array:
        """S_k at sizes (B, G) within the head."""
        return array_namespace(sizes).take_along_axis(self.prefix, sizes - 1, axis=-1)

    def reaches(self, sizes: Array) -> Array:
        """Whether all entries above the tail level c_k lie in the head, (B, G)."""
        if self.values.shape[-1] == self.vocab_size:
            return sizes > 0
        level = tail_level(self.kept_mass(sizes), sizes, self.vocab_size)
        return self.values[:, -1:] <= level

    def deviation(self, sizes: Array) -> Array:
        """N(k) at sizes (B, G) that the head reaches."""
        xp = array_namespace(sizes)
        kept = self.kept_mass(sizes)
        level = tail_level(kept, sizes, self.vocab_size)
        last = xp.maximum(self.count_above(level), sizes)  # crossover: x_i > c_k for i <= last
        excess = self.kept_mass(last) - kept - xp.astype(last - sizes, kept.dtype) * level
        return xp.where(sizes >= self.vocab_size, 0 * kept, xp.clip(2.0 * excess, 0.0, None))
