"""A module as one solve sees it: the same function at every evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from difflayers.errors import ProblemError

_NOTHING = object()


@dataclass(frozen=True)
class _Slot:
    """Where a module keeps a tensor, and which of the frozen tensors goes there."""

    holder: dict[str, Any]
    name: str
    index: int
    is_buffer: bool = False


class FrozenModule:
    """``(z, tensors, *args) -> module(z, *args)`` for one solve and for its derivatives.

    These evaluate the module many times and need the same function each time, so:

    - parametrizations (``torch.nn.utils.parametrizations``) are evaluated once, here, on autograd's graph;
    - random numbers from torch's global generators are those of the first evaluation, and the generators go on as if
      there had been no other;
    - what evaluations do to buffers happens to copies, until :meth:`commit`.

    Args:
        module: the module.
        advance: whether evaluating parametrizations changes their buffers, as power iterations of spectral
            normalization do while training.

    Attributes:
        module: the module.
        tensors: what evaluations depend on: parameters, evaluated parametrizations, buffers.

    Raises:
        ProblemError: the module is, or holds, a ``ScriptModule``.
    """

    def __init__(self, module: nn.Module, *, advance: bool = True) -> None:
        self.module, self._advance = module, advance
        self._slots: list[_Slot] = []
        self._parametrized: list[tuple[nn.Module, type]] = []
        # These two are found out by the first evaluation.
        self._written: frozenset[int] | None = None
        self._random: list[Tensor] = []
        self.tensors = self._collect()

    def __call__(self, z: Any, tensors: Sequence[Tensor], *args: Any) -> Any:
        if self._written is None:
            return self._first(z, tensors, args)
        with self._replaying(z):
            return self._evaluate(z, tensors, args, self._written)[0]

    @property
    def writes(self) -> bool:
        """Whether evaluations change buffers."""
        return bool(self._written)

    def commit(self, z: Any, args: Sequence[Any]) -> None:
        """One evaluation that changes the module's own buffers."""
        slots = [slot for slot in self._slots if not slot.is_buffer]
        with torch.no_grad(), self._replaying(z):
            self._swapped(slots, [t.detach() for t in self.tensors], lambda: self.module(z, *args))

    def _first(self, z: Any, tensors: Sequence[Tensor], args: Sequence[Any]) -> Any:
        buffers = frozenset(slot.index for slot in self._slots if slot.is_buffer)
        before, versions = _generator_states(_device(z)), _versions(args)
        # A copy, for torch's own complaint about writing to leaves doesn't say what to do.
        z = pytree.tree_map(torch.clone, z)
        value, written = self._evaluate(z, tensors, args, buffers)
        if any(_versions(z)) or _versions(args) != versions:
            raise ProblemError(
                "the cell writes to its unknown or to an input in place, where the next evaluation needs what was "
                "there; use operations that return new tensors, or clone() first"
            )
        self._written = written
        if not all(map(torch.equal, before, _generator_states(_device(z)))):
            self._random = before
        return value

    @contextlib.contextmanager
    def _replaying(self, z: Any) -> Iterator[None]:
        """Random numbers of the first evaluation inside, those that would have come next after it."""
        if not self._random:
            yield
            return
        device = _device(z)
        current = _generator_states(device)
        _set_generators(self._random, device)
        try:
            yield
        finally:
            _set_generators(current, device)

    def _evaluate(
        self, z: Any, tensors: Sequence[Tensor], args: Sequence[Any], copied: frozenset[int]
    ) -> tuple[Any, frozenset[int]]:
        """The value, and which of the tensors in ``copied`` it wrote to."""
        used = [t.clone() if i in copied else t for i, t in enumerate(tensors)]
        left: dict[int, Any] = {}

        def call() -> Any:
            value = self.module(z, *args)
            left.update((slot.index, slot.holder.get(slot.name)) for slot in self._slots if slot.index in copied)
            return value

        value = self._swapped(self._slots, used, call)
        return value, frozenset(i for i in copied if left[i] is not used[i] or _may_be_written(used[i]))

    def _swapped(self, slots: Iterable[_Slot], tensors: Sequence[Tensor], call: Callable[[], Any]) -> Any:
        # What functional_call does, at a fiftieth of its cost; and parametrized modules become what they were.
        kept = [(slot, slot.holder.get(slot.name, _NOTHING)) for slot in slots]
        wrapped = [(module, type(module)) for module, _ in self._parametrized]
        try:
            for module, plain in self._parametrized:
                object.__setattr__(module, "__class__", plain)
            for slot, _ in kept:
                slot.holder[slot.name] = tensors[slot.index]
            return call()
        finally:
            for slot, tensor in kept:
                if tensor is _NOTHING:
                    slot.holder.pop(slot.name, None)
                else:
                    slot.holder[slot.name] = tensor
            for module, own in wrapped:
                object.__setattr__(module, "__class__", own)

    def _collect(self) -> tuple[Tensor, ...]:
        """Every tensor once, tied ones too, and the slots where they go."""
        found: dict[int, Tensor] = {}
        positions: dict[int, int] = {}
        for holder, name, tensor, is_buffer in self._visible():
            found[id(tensor)] = tensor
            index = positions.setdefault(id(tensor), len(positions))
            self._slots.append(_Slot(holder, name, index, is_buffer))
        buffers = {slot.index for slot in self._slots if slot.is_buffer}
        # The buffers' own memory changes in commit(), before derivatives read what the solve saw.
        return tuple(t.clone() if i in buffers else t for i, t in enumerate(found.values()))

    def _visible(self) -> Iterator[tuple[dict[str, Any], str, Tensor, bool]]:
        for module in _without_parametrizations(self.module, set()):
            for name, value in self._evaluated(module):
                yield module.__dict__, name, value, False
            for holder, is_buffer in ((module._parameters, False), (module._buffers, True)):
                for name, tensor in holder.items():
                    if tensor is not None:
                        yield holder, name, tensor, is_buffer

    def _evaluated(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The values of a module's parametrizations, if it has any."""
        if not parametrize.is_parametrized(module):
            return
        parametrizations = cast(nn.ModuleDict, module.parametrizations)
        names = list(parametrizations)
        # In an equilibrium within an equilibrium the outer one has evaluated them, for now.
        evaluated = names[0] in module.__dict__
        plain = type(module) if evaluated else parametrize.type_before_parametrizations(module)
        self._parametrized.append((module, plain))
        kept = [] if self._advance else [(b, b.clone()) for b in parametrizations.buffers()]
        yield from [(name, getattr(module, name)) for name in names]
        for buffer, value in kept:
            buffer.copy_(value)


def _without_parametrizations(module: nn.Module, seen: set[int]) -> Iterator[nn.Module]:
    if id(module) in seen:
        return
    if isinstance(module, torch.jit.ScriptModule):
        raise ProblemError("a ScriptModule doesn't let go of its parameters; pass the module that it was made from")
    seen.add(id(module))
    yield module
    hidden = "parametrizations" if parametrize.is_parametrized(module) else None
    for name, child in module.named_children():
        if name != hidden:
            yield from _without_parametrizations(child, seen)


def _may_be_written(copy: Tensor) -> bool:
    # These keep no count of writes.
    return copy.is_inference() or torch._C._functorch.is_batchedtensor(copy) or copy._version > 0


def _versions(tree: Any) -> list[int]:
    tensors = (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
    return [t._version for t in tensors if not t.is_inference()]


def _device(z: Any) -> torch.device:
    device: torch.device = pytree.tree_leaves(z)[0].device
    return device


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type != "cpu" and hasattr(backend := getattr(torch, device.type, None), "get_rng_state"):
        states.append(backend.get_rng_state(*_which(device)))  # type: ignore[union-attr]
    return states


def _set_generators(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        getattr(torch, device.type).set_rng_state(state, *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)
