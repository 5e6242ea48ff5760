"""What properties are made of: cases that can be written down, checks that count, limits on time."""

import json
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from difflayers import Status
from difflayers.errors import ProblemError

SECONDS = 60  # for one example that should take milliseconds; machines may be busy
EPS = {torch.float64: 2e-16, torch.float32: 1.2e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What cases of all functions are drawn from.
PRECISIONS = st.sampled_from(["float64", "float64", "float32"])
FLAWS = st.sampled_from([False] * 9 + [True])
SEEDS = st.integers(0, 10**6)


class Violation(AssertionError):
    """A promise that wasn't kept."""


@dataclass(frozen=True)
class Property:
    """What holds of a public function, whatever the case.

    Attributes:
        name: of the function.
        family: the part of the package that it belongs to.
        case: the class of its cases: a dataclass of numbers and strings, from which all data follow.
        cases: draws them.
        check: counts how samples ended, by name of status; raises :class:`Violation`.
    """

    name: str
    family: str
    case: type
    cases: st.SearchStrategy
    check: Callable[[Any], Counter]

    def __call__(self, case: Any) -> Counter:
        """The counts; everything but an answer in time is a violation. Warnings are errors."""
        with warnings.catch_warnings(), limited(SECONDS):
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*torch.jit.script.* is deprecated")
            try:
                return self.check(case)
            except Violation:
                raise
            except Exception as error:
                raise Violation(f"{type(error).__name__}: {error}") from error

    def written(self, case: Any) -> str:
        """The case as JSON."""
        return json.dumps({"function": self.name, "case": asdict(case)}, indent=2)


def replayed(text: str, properties: dict[str, Property]) -> Counter:
    """What :meth:`Property.written` wrote, checked again."""
    found = json.loads(text)
    one = properties[found["function"]]
    return one(one.case(**found["case"]))


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises a violation when the time is over; outside of the main thread there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise Violation(f"took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def expect(condition: Any, text: str) -> None:
    if not bool(condition):
        raise Violation(text)


def refused(call: Callable[[], Any]) -> Counter:
    """What a flawed call must get."""
    try:
        call()
    except (ProblemError, TypeError) as error:
        expect(str(error), "an error without a message")
        return Counter({f"refused: {type(error).__name__}": 1})
    raise Violation("a flawed call got an answer")


def random(case: Any) -> Callable[..., torch.Tensor]:
    """Standard normal tensors in float64, the same for every call with this case."""
    generator = torch.Generator().manual_seed(case.seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def integers(case: Any) -> np.random.Generator:
    return np.random.default_rng(case.seed)


def per_sample(tensor: torch.Tensor, samples: int) -> torch.Tensor:
    return tensor.reshape(samples, tensor.numel() // max(samples, 1))


def counted(status: Any) -> Counter:
    return Counter(Status(int(code)).name for code in torch.as_tensor(status).reshape(-1))


def check_like(value: Any, shape: tuple[int, ...], dtype: torch.dtype, numpy: bool = False) -> torch.Tensor:
    """The value as a tensor, after looking at its type, dtype and shape."""
    expect(isinstance(value, np.ndarray | np.generic) == numpy, f"NumPy in is {numpy}, but out came {type(value)}")
    tensor = torch.as_tensor(value)
    expect(tensor.dtype == dtype and tensor.device.type == "cpu", f"dtype {tensor.dtype} instead of {dtype}")
    expect(tensor.shape == torch.Size(shape), f"shape {tuple(tensor.shape)} instead of {shape}")
    return tensor


def check_answers(value: torch.Tensor, status: Any) -> torch.Tensor:
    """Finite where there is an answer and NaN elsewhere, for ``(samples, ...)``; where there is success."""
    status = torch.as_tensor(status).reshape(-1)
    rows = per_sample(value.detach(), len(status))
    answered = status <= int(Status.STALLED)
    if rows.shape[1]:
        expect(rows[answered].isfinite().all(), "an answer isn't finite")
        expect(rows[~answered].isnan().all(), "a sample without an answer isn't NaN")
    return status == int(Status.SUCCESS)


def check_gradients(gradients: Any, ok: torch.Tensor) -> None:
    """Gradients ``(samples, ...)`` of a loss over the samples ``ok``: the others got exactly zero."""
    for gradient in gradients:
        if gradient is not None:
            expect((per_sample(gradient, len(ok))[~ok] == 0).all(), "a masked sample has a gradient that isn't zero")


def check_close(one: torch.Tensor, other: torch.Tensor, tolerance: float, what: str) -> None:
    """Equal, relative to the largest entry."""
    one, other = one.detach().double(), other.detach().double()
    if not one.numel():
        return
    scale = torch.maximum(one.abs().amax(), other.abs().amax()).clamp_min(1e-30)
    error = float(((one - other).abs() / scale).amax())
    expect(error <= tolerance, f"{what} differs by {error:.1e} of its largest entry; {tolerance:.1e} is fine")


def without(tensor: torch.Tensor, sample: int) -> torch.Tensor:
    return torch.cat([tensor[:sample], tensor[sample + 1 :]])
