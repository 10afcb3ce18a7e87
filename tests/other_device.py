"""A stand-in for an accelerator: tensors that may not meet those of main memory.

Their numbers lie in main memory, and torch works them out there; but, as on an accelerator, an
operation of both kinds fails, but for copies, indices and single numbers, and numpy cannot look in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from calibrate.decode.models import LanguageModel, StepOutput

OTHER = torch.device("meta")
"""Its name: a device that torch knows in every build, and that no tensor of the project lies on."""

COPIES = {"aten::copy_", "aten::_to_copy", "aten::to"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Elsewhere(torch.Tensor):
    """A tensor on OTHER, with its numbers in `inner`."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Elsewhere:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=OTHER,
        )
        out.inner = inner
        return out

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r})"

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor of the other device to numpy")

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor of the other device to numpy")

    def tolist(self) -> Any:
        return self.inner.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation as the other device has it."""
    flat, form = tree_flatten((args, kwargs))
    name = func._schema.name
    here = [a for a in flat if isinstance(a, torch.Tensor) and not isinstance(a, Elsewhere)]
    there = any(isinstance(a, Elsewhere) for a in flat)
    asked = next((a for a in flat if isinstance(a, torch.device)), None)
    if there and name not in COPIES:
        own = flat[0] if name in INDEXED else None
        allowed = isinstance(own, Elsewhere)
        if allowed and name != "aten::index":  # values must lie where they are put
            values = args[2]
            allowed = isinstance(values, Elsewhere) or values.ndim == 0
        if not allowed and any(a.ndim for a in here):
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    plain = [a.inner if isinstance(a, Elsewhere) else a for a in flat]
    plain = [
        torch.device("cpu") if isinstance(a, torch.device) and a == OTHER else a for a in plain
    ]
    own_args, own_kwargs = tree_unflatten(plain, form)
    out = func(*own_args, **own_kwargs)
    if func._schema.is_mutable:
        return kwargs.get("out", args[0])
    goes = there if asked is None else asked == OTHER
    return (
        tree_map(lambda a: Elsewhere(a) if isinstance(a, torch.Tensor) else a, out) if goes else out
    )


class _Made(TorchFunctionMode):
    """These ask no dispatch mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.asarray) and kwargs.get("device") == OTHER:
            return func(*args, **kwargs | {"device": "cpu"}).to(OTHER)
        return func(*args, **kwargs)


class _Brought(TorchDispatchMode):
    """Tensors that are made on OTHER by others, or brought there."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def other_device() -> Iterator[None]:
    """Within it OTHER can be used."""
    with _Brought(), _Made():
        yield


class ElsewhereModel:
    """A language model whose logits, and the tokens it is given, lie on OTHER."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.vocab_size, self.device = model, model.vocab_size, OTHER

    def start(
        self, contexts: Sequence[Sequence[int]], attention: bool, fill: bool = True
    ) -> ElsewhereSession:
        return ElsewhereSession(self.model.start(contexts, attention, fill))


class ElsewhereSession:
    def __init__(self, session: Any) -> None:
        self.session = session

    @property
    def forward_s(self) -> float:
        return self.session.forward_s

    def step(self, tokens: torch.Tensor) -> StepOutput:
        assert isinstance(tokens, Elsewhere)
        found = self.session.step(tokens.inner)
        return StepOutput(
            *(
                None if one is None else Elsewhere(one)
                for one in (found.logits, found.attention, found.attention_mask)
            )
        )

    def keep(self, rows: torch.Tensor) -> None:
        assert isinstance(rows, Elsewhere)
        self.session.keep(rows.inner)
