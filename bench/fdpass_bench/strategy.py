"""A strategy as it is written on the command line, and the group that it stands for: who shares the port, and what serves in the workers.
It starts nothing by itself and measures nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fdpass
from fdpass_bench import answer, answer_async

#: Each order that a strategy of WorkerGroup can be given.
ORDERS: dict[str, tuple[str, ...]] = {
    "shared": ("rotate", "first", "least-loaded"),
    "reuseport": (),
    "reuseport-bare": (),
    "dispatch": ("round-robin", "least-loaded"),
    "auto": (),
}

#: How each program that uses the group's listening socket is run: what serves, and the factory of its event loop. -stock: for comparison.
PROGRAMS: dict[str, tuple[str, str]] = {
    "asyncio": ("asyncio", "fdpass.aio:new_event_loop"),
    "uvloop": ("asyncio", "fdpass.aio:new_uvloop_event_loop"),
    "asyncio-stock": ("asyncio", "asyncio:SelectorEventLoop"),
    "uvloop-stock": ("asyncio", "uvloop:new_event_loop"),
    "uvicorn": ("uvicorn", "fdpass.aio:new_event_loop"),
    "uvicorn-uvloop": ("uvicorn", "fdpass.aio:new_uvloop_event_loop"),
    "uvicorn-stock": ("uvicorn", "asyncio:SelectorEventLoop"),
    "uvicorn-uvloop-stock": ("uvicorn", "uvloop:new_event_loop"),
}

_VARIANTS = {name: (*orders, *(PROGRAMS if name == "shared" else ())) for name, orders in ORDERS.items()}

Manner = answer_async.Manner


@dataclass(frozen=True)
class Strategy:
    """NAME, NAME:ORDER, or shared:PROGRAM; `variant` is what stands behind the colon."""

    name: str
    variant: str | None = None

    def __str__(self) -> str:
        return self.name if self.variant is None else f"{self.name}:{self.variant}"

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Raises ValueError with what is allowed, or with what would have to be installed."""
        name, colon, variant = text.strip().partition(":")
        found = cls(name, variant if colon else None)
        if name not in _VARIANTS or (colon and variant not in _VARIANTS[name]):
            allowed = list(_VARIANTS) + [f"{name}:{variant}" for name, variants in _VARIANTS.items() for variant in variants]
            raise ValueError(f"there is no strategy {text.strip()!r}; there are {', '.join(allowed)}")
        for package in ("uvicorn", "uvloop"):
            if package in str(found) and importlib.util.find_spec(package) is None:
                raise ValueError(f"{found} needs {package}: pip install {package}")
        return found

    @property
    def order(self) -> str | None:
        return None if self.variant in PROGRAMS else self.variant

    @property
    def program(self) -> str:
        """What serves in a worker: "listener" (it accepts from its Listener), "asyncio" or "uvicorn"."""
        return PROGRAMS[self.variant][0] if self.variant in PROGRAMS else "listener"

    @property
    def speaks_http(self) -> bool:
        """Whether its workers need a request before they say who they are, whatever the manner."""
        return self.program == "uvicorn"

    def discipline(self, credits: int | None) -> str | None:
        """How its connections queue, in the words of theory.py; None where no theory is known."""
        if self.program != "listener":
            return None  # an event loop takes connections ahead of its work
        if self.name == "dispatch" and credits not in (None, 1):
            return None  # what was sent ahead waits in a worker, where no other can take it
        return {"shared": "one queue", "dispatch": "one queue", "reuseport": "split", "reuseport-bare": "split"}.get(self.name)

    def group(
        self,
        manner: Manner,
        address: str,
        workers: int,
        *,
        service: float = 0.0,
        work: str = "sleep",
        keep_alive: bool = False,
        credits: int | None = None,
        **options: Any,
    ) -> fdpass.WorkerGroup:
        """The group, not started, whose workers serve in one of the manners of answer_async.py; options are WorkerGroup's.

        service: seconds a worker holds a connection that it greets; a timed one brings its own along. credits: of dispatch, else
        passed over. Raises what WorkerGroup does.
        """
        target: Callable[..., object]
        args: tuple[Any, ...]
        if self.variant in PROGRAMS:
            program, loop = PROGRAMS[self.variant]
            target = answer_async.uvicorn if program == "uvicorn" else answer_async.server
            args = (loop, work) if program == "uvicorn" else (loop, manner, service, work)
        else:
            targets: dict[Manner, tuple[Callable[..., object], tuple[Any, ...]]] = {
                "greet": (answer.speak_first, (service,)),
                "timed": (answer_async.kept if keep_alive else answer.timed, (work,)),
                "hold": (answer.hold, ()),
            }
            target, args = targets[manner]
        if self.name == "dispatch" and credits is not None:
            options["credits"] = credits
        return fdpass.WorkerGroup(target, address, workers=workers, strategy=self.name, order=self.order, args=args, **options)
