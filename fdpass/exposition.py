"""What a group says of itself, as a page for Prometheus (text exposition format, version 0.0.4). It serves nothing and asks no worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fdpass.workers import WorkerGroup, WorkerStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("starting", "ready", "stopping", "ended")

#: Name, type, help, and what a worker's figure is: None where there is none to tell.
_FAMILIES = (
    ("fdpass_worker_up", "gauge", "1 while the worker is ready.", lambda one: int(one.state == "ready")),
    ("fdpass_worker_state", "gauge", "1 for the state that the worker is in, 0 for the others.", None),
    ("fdpass_worker_accepted_total", "counter", "Connections accepted, over restarts and rolls.", lambda one: one.accepted),
    ("fdpass_worker_open_connections", "gauge", "Connections accepted and not closed yet.", lambda one: one.open),
    ("fdpass_worker_restarts_total", "counter", "Successors of processes that had ended by themselves.", lambda one: one.restarts),
    (
        "fdpass_worker_heartbeat_age_seconds",
        "gauge",
        "Seconds since the worker last accepted or went to wait.",
        lambda one: one.heartbeat,
    ),
    (
        "fdpass_worker_queue",
        "gauge",
        "Connections that wait in the listening socket of the worker; workers that share one show the same.",
        lambda one: one.queue,
    ),
    ("fdpass_worker_queue_limit", "gauge", "How many may wait in it.", lambda one: one.queue_limit),
)


def metrics(group: WorkerGroup, *groups: WorkerGroup) -> str:
    """The page for one group or several, to be served as text/plain; version=0.0.4; charset=utf-8.

    Per worker (labels group, the group's name; worker, its own; index): fdpass_worker_up, _state, _accepted_total, _open_connections,
    _restarts_total, _heartbeat_age_seconds, _queue, _queue_limit; per group fdpass_group_info with address and strategy. A figure that
    nobody can tell has no line. Groups on one page need names of their own. Source: group.stats(), which asks no worker.
    Raises ValueError for two groups of one name.
    """
    names = [one._name for one in (group, *groups)]
    if len(set(names)) < len(names):
        raise ValueError(f"groups on one page need different names (name=), these are {', '.join(names)}")
    return "\n".join([*_lines((group, *groups)), ""])


def _lines(groups: tuple[WorkerGroup, ...]) -> Iterator[str]:
    workers = [(group._name, one) for group in groups for one in group.stats()]
    yield from _head("fdpass_group_info", "gauge", "Always 1; what the group serves and how it shares it.")
    for group in groups:
        yield _sample("fdpass_group_info", 1, group=group._name, address=str(group.endpoint), strategy=group._strategy.name)
    for name, kind, words, figure in _FAMILIES:
        yield from _head(name, kind, words)
        for group_name, one in workers:
            if figure is None:
                for state in STATES:
                    yield _sample(name, int(one.state == state), **_who(group_name, one), state=state)
            elif (value := figure(one)) is not None:
                yield _sample(name, value, **_who(group_name, one))


def _who(group: str, one: WorkerStats) -> dict[str, str]:
    return {"group": group, "worker": one.name, "index": str(one.index)}


def _head(name: str, kind: str, words: str) -> tuple[str, str]:
    return f"# HELP {name} {words}", f"# TYPE {name} {kind}"


def _sample(name: str, value: float, **labels: str) -> str:
    pairs = ",".join(f'{label}="{_escape(text)}"' for label, text in labels.items())
    return f"{name}{{{pairs}}} {value}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
