"""A GPU that is not there: tensors that say they are on one, and are told off as torch would tell them.

    with Card() as card:  torch.zeros(3, device="cuda")  ─► lies in the CPU's memory, and says "cuda:0"

What mixes devices raises as on a GPU, and so does what asks for memory of one as numpy. Whatever makes the CPU wait for
the card is counted by the line that asked. Results are those of the CPU: the same bits, unless a program asks where
its tensors lie.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

PACKAGE = str(Path(__file__).parents[1] / "mixtools")
HERE = torch.device("cuda", 0)
_DEVICE = torch.Tensor.device.__get__
_WAITS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "masked_select", "unique",
          "bincount", "equal", "allclose"}  # fmt: skip
_AS_NUMPY = {"numpy", "__array__", "__dlpack__"}
_MAKES = {"zeros", "ones", "empty", "full", "arange", "eye", "tensor", "rand", "randn", "randint", "linspace",
          "empty_strided"}  # fmt: skip


class OnCard(Tensor):
    """A tensor of the CPU's that a Card takes for one of its own."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Card(TorchFunctionMode):
    """`waits`: how often each line of the package made the CPU wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if name == "__get__":
            return self._tell(func, args[0])
        tensors = [*_tensors((args, kwargs))]
        cards = [one for one in tensors if isinstance(one, OnCard)]
        if name in _MAKES or name.startswith("new_") or name.endswith("_like"):
            return self._make(func, cards, args, kwargs)
        if name in ("to", "cpu", "cuda"):
            return self._move(func, name, args, kwargs)
        if not cards:
            return func(*args, **kwargs)
        if name in _AS_NUMPY:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if "mixtools" in str(func):
            return self._operation(str(func), func, args, kwargs)
        self._expect_together(name, args, tensors, cards)
        if name in _WAITS or (name in ("__getitem__", "__setitem__") and _chooses(args[1])):
            self._wait()
        return self._run(func, args, kwargs)

    # --- ways of a call ---

    def _tell(self, func: Callable[..., Any], own: Tensor) -> Any:
        """A property."""
        if not isinstance(own, OnCard):
            return func(own)
        made = HERE if func == _DEVICE else func(own.as_subclass(Tensor))
        return made.as_subclass(OnCard) if isinstance(made, Tensor) else made

    def _make(self, func: Callable[..., Any], cards: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        where = kwargs.pop("device", None)
        there = bool(cards) if where is None else torch.device(where).type == "cuda"
        made = func(*_plain(args), **_plain(kwargs))
        return made.as_subclass(OnCard) if there else made

    def _move(self, func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """A copy where it goes elsewhere."""
        own, rest = args[0], list(args[1:])
        target: torch.device | None = {"cpu": torch.device("cpu"), "cuda": HERE, "to": None}[name]
        if name == "to":
            asked = [kwargs.pop("device", None), *(rest.pop(0) for _ in rest[:1] if _names_device(rest[0]))]
            for one in asked:
                if one is not None:
                    target = one.device if isinstance(one, Tensor) else torch.device(one)
                    rest += [one.dtype] if isinstance(one, Tensor) else []
                    target = HERE if isinstance(one, OnCard) else target
        there = isinstance(own, OnCard) if target is None else target.type == "cuda"
        moves, blocking = there != isinstance(own, OnCard), not kwargs.pop("non_blocking", False)
        made = _plain(own)
        made = made.to(*rest, **kwargs) if name == "to" and (rest or kwargs) else made
        if not moves:
            return own if made is _plain(own) or made.data_ptr() == own.data_ptr() else _placed(made, there)
        if blocking or not there:
            self._wait()
        return _placed(made.clone(), there)

    def _operation(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """An operation of ours: of these only the rounding of blocks is for a card, with its groups on the CPU."""
        if "round_block" not in name:
            raise NotImplementedError(f"{name} on cuda")
        on_cpu = [index for index, one in enumerate(args) if isinstance(one, Tensor) and not isinstance(one, OnCard)]
        if not {6} <= {*on_cpu} <= {6, 8}:
            raise RuntimeError(f"{name}: arguments {on_cpu} are on the CPU")
        return func(*_plain(args), **_plain(kwargs))

    def _run(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What changes a tensor gives that tensor back."""
        before = [one for one in _tensors((args, kwargs)) if isinstance(one, OnCard)]
        plain = {id(one): one.as_subclass(Tensor) for one in before}
        own = {id(plain[id(one)]): one for one in before}

        def back(one: Any) -> Any:
            return own.get(id(one), one.as_subclass(OnCard)) if isinstance(one, Tensor) else one

        made = func(*_mapped(args, plain), **_mapped(kwargs, plain))
        return back(made) if isinstance(made, Tensor) else pytree.tree_map(back, made)

    # --- rules ---

    def _expect_together(self, name: str, args: Any, tensors: list[Tensor], cards: list[Tensor]) -> None:
        """As torch has it: a number may come from the CPU, so may what tells rows; copies go either way."""
        others = [one for one in tensors if not isinstance(one, OnCard) and one.ndim]
        if name == "copy_":
            if len(cards) < 2 and not isinstance(args[0], OnCard):
                self._wait()
            return
        if name == "__setitem__" and not [*_tensors(args[1])]:
            if others:
                self._wait()
            return
        if name == "__getitem__" and isinstance(args[0], OnCard):
            if others:
                self._wait()
            return
        if others:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")

    def _wait(self) -> None:
        self.waits[next(_lines(), "elsewhere")] += 1


def _lines() -> Iterator[str]:
    """Of the package, from the innermost on."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            yield f"{code.co_filename.removeprefix(PACKAGE + '/')}:{code.co_qualname}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]


def _placed(made: Tensor, there: bool) -> Tensor:
    return made.as_subclass(OnCard) if there else made.as_subclass(Tensor)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Of arguments, which no more than lists, tuples and dictionaries hold."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for one in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(one)


def _mapped(tree: Any, plain: Mapping[int, Tensor]) -> Any:
    if isinstance(tree, (tuple, list)):
        return type(tree)(_mapped(one, plain) for one in tree)
    if isinstance(tree, dict):
        return {key: _mapped(one, plain) for key, one in tree.items()}
    return plain.get(id(tree), tree)


def _plain(tree: Any) -> Any:
    return _mapped(tree, {id(one): one.as_subclass(Tensor) for one in _tensors(tree) if isinstance(one, OnCard)})


def _names_device(one: Any) -> bool:
    return isinstance(one, (str, torch.device, Tensor))


def _chooses(index: Any) -> bool:
    """By a mask: how many that leaves is known on the card alone."""
    return any(one.dtype == torch.bool for one in _tensors(index))
