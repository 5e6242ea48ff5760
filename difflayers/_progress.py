"""A bar for what takes long, shown to whoever asks for it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO, TypeVar

import torch
from torch import Tensor

from difflayers._autodiff import in_functorch
from difflayers._solution import Solution, Status
from difflayers.errors import MissingBackendError

T = TypeVar("T")
# What share of a solve is done, and a few words on it.
Report = Callable[[], tuple[float, str]]


class Bar:
    """One line for whatever is solved right now, drawn ten times a second at most.

    A solve inside another one, such as one that its residual makes, isn't shown.
    """

    interval = 0.1
    long = 0.5  # seconds from which on a solve shows every phase

    def __init__(self, file: TextIO | None) -> None:
        self._tqdm, self._file = _tqdm(), file
        self._line: Any = None
        self._depth = 0
        self._title, self._done, self._text = "", 0.0, ""
        self._due = self._start = self._phase = 0.0

    @property
    def visible(self) -> bool:
        """Whether the solve that runs here is the one that is shown; a transform may have wrapped its numbers."""
        return self._depth == 1 and not in_functorch()

    def follow(self, title: str, solve: Callable[[], Solution]) -> Solution:
        """What ``solve`` returns, shown while it runs."""
        self._depth += 1
        try:
            if not self.visible:
                return solve()
            self._start = self._phase = time.perf_counter()
            self._title, self._done, self._text = title, 0.0, ""
            self._draw()
            solution = solve()
            self._done, self._text = 1.0, _outcome(solution)
            self._draw()
            return solution
        finally:
            self._depth -= 1

    def show(self, report: Report, *, steady: bool = True) -> None:
        """Draw what ``report`` says, if it is time to; ``steady``: whether what is left takes as long as what was."""
        if time.perf_counter() < self._due:
            return
        done, text = report()
        done = min(max(done, 0.0), 1.0)
        now = time.perf_counter()
        if done < self._done:
            self._phase = now
        left = (now - self._phase) * (1 - done) / done if done and steady else 0.0
        self._done, self._text = done, f"{text}, {self._tqdm.format_interval(left)} left" if left >= 1 else text
        self._draw()

    def enter(self, phase: str) -> None:
        """Say what begins now, of which nobody knows how long it takes."""
        self._text = phase
        if time.perf_counter() - self._start > self.long:
            self._due = 0.0
        self._draw()

    def close(self) -> None:
        """Leave the line as it is now."""
        if self._line is not None:
            self._due = 0.0
            self._draw()
            self._line.close()

    def _draw(self) -> None:
        now = time.perf_counter()
        if now < self._due:
            return
        self._due = now + self.interval
        if self._line is None:
            shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
            self._line = self._tqdm(
                total=1.0, desc=self._title, bar_format=shape, file=self._file, leave=None, dynamic_ncols=True
            )
        self._line.n = self._done
        self._line.set_description_str(self._title, refresh=False)
        self._line.set_postfix_str(self._text, refresh=False)
        self._line.refresh()


# Not seen by the threads in which autograd solves for what is on a GPU, nor by those of backends.
_bar: ContextVar[Bar | None] = ContextVar("bar", default=None)
current_bar = _bar.get


@contextmanager
def progress(*, file: TextIO | None = None) -> Iterator[None]:
    """Show a bar for every solve that runs inside, in this thread: on one line, the latest one at last.

    A single call shows its own with ``progress=True``. There are no bars inside ``torch.func`` transforms and compiled
    graphs, and none for solves inside others.

    Args:
        file: where to write; None is ``sys.stderr``, or a widget in a notebook.

    Raises:
        MissingBackendError: tqdm isn't installed.
    """
    if _bar.get() is not None:  # the one around this one shows it
        yield
        return
    bar = Bar(file)
    token = _bar.set(bar)
    try:
        yield
    finally:
        _bar.reset(token)
        bar.close()


def showing(wanted: bool, solve: Callable[[], T]) -> T:
    """What ``solve`` returns, with a bar if it is wanted."""
    if not wanted or torch.compiler.is_compiling() or in_functorch():
        return solve()
    with progress():
        return solve()


def shown() -> Bar | None:
    """The bar of the solve that runs here, if there is one."""
    bar = _bar.get()
    return bar if bar is not None and bar.visible else None


def enter(phase: str) -> None:
    """Say on the bar, if one is shown, what the solve that runs here does from now on."""
    if (bar := shown()) is not None:
        bar.enter(phase)


def counted(items: Iterable[T], total: int, each: int = 1) -> Iterable[T]:
    """The items, counted on the bar when the next one is asked for: ``total`` samples, of which one has ``each``."""
    bar = shown()
    return items if bar is None else _counted(bar, items, total, each)


def _counted(bar: Bar, items: Iterable[T], total: int, each: int) -> Iterator[T]:
    done = 0

    def report() -> tuple[float, str]:
        return done / max(total, 1), f"{done:,}/{total:,} samples"

    for item in items:
        yield item
        done = min(done + each, total)
        bar.show(report)


def _outcome(solution: Solution) -> str:
    """How a solve ended: largest numbers of the batch, and how many samples have which status."""
    steps, residual = (_largest(solution.stats.get(name)) for name in ("steps", "residual"))
    counts = Counter(Status(code).name for code in solution.status.flatten().tolist())
    parts = [] if steps is None else [f"{steps:,.0f} steps"]
    parts += [] if residual is None else [f"residual {residual:.1e}"]
    return ", ".join([*parts, *(f"{count:,} {name}" for name, count in counts.items())])


def _largest(stat: Tensor | None) -> float | None:
    return None if stat is None or stat.numel() == 0 else float(stat.max())


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise MissingBackendError("tqdm", "demo") from error
    return tqdm
