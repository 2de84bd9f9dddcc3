"""Descriptors as arguments and results of ProcessPoolExecutor, joblib, loky and Dask: a program for test_programs.py.

python pools.py NAME; its output is a JSON object of what was here, what the workers had and what came back.
"""

import contextlib
import importlib
import json
import os
import socket
import sys
from multiprocessing import get_context

from facts import cookie, open_descriptors, read, sharer_ran, through

import fdpass
from fdpass import _claims, _store


@contextlib.contextmanager
def executor():
    """concurrent.futures over spawn."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield lambda *work: list(pool.map(*work))


@contextlib.contextmanager
def joblib():
    """joblib with its default backend, a loky of its own."""
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor

    yield lambda function, items: Parallel(n_jobs=2)(delayed(function)(item) for item in items)
    get_reusable_executor().shutdown(wait=True)


@contextlib.contextmanager
def loky():
    """loky itself, whose pickler is cloudpickle's."""
    from loky import ProcessPoolExecutor

    with ProcessPoolExecutor(2) as pool:
        yield lambda *work: list(pool.map(*work))


@contextlib.contextmanager
def dask():
    """Two worker processes of a LocalCluster, whose scheduler is here."""
    from distributed import Client, LocalCluster

    cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with cluster, Client(cluster) as client:
        yield lambda function, items: client.gather([client.submit(function, item, pure=False) for item in items])


#: Trackers of their own, which a process starts once and keeps.
TRACKERS = {"joblib": ["joblib.externals.loky.backend.resource_tracker"], "loky": ["loky.backend.resource_tracker"]}


def main():
    name = sys.argv[1]
    run = {"executor": executor, "joblib": joblib, "loky": loky, "dask": dask}[name]
    # Its pickler is a ForkingPickler: with register() it takes raw sockets. The others take handles.
    raw = name == "executor"
    if raw:
        fdpass.register()
    for tracker in ("multiprocessing.resource_tracker", *TRACKERS.get(name, [])):
        importlib.import_module(tracker).ensure_running()
    before = open_descriptors()
    pairs = [socket.socketpair() for _ in range(4)]
    facts = {"pid": os.getpid(), "here": [cookie(far) for _, far in pairs]}
    file = os.memfd_create("a file")
    os.write(file, b"what it says")
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, file)
        items = [stack.enter_context(far if raw else fdpass.SocketHandle(far)) for _, far in pairs]
        with run() as work:
            results = work(through, items)
            facts["read"] = work(read, [stack.enter_context(fdpass.OwnedFd(os.dup(file))) for _ in range(2)])
        pids, there, sharers, back = zip(*results, strict=True)
        back = [stack.enter_context(item.open() if isinstance(item, fdpass.SocketHandle) else item) for item in back]
        facts |= {"pids": pids, "there": there, "back": [cookie(sock) for sock in back], "sharer": any(sharers) or sharer_ran()}
        facts["said"] = [int(near.recv(100)) for near, _ in pairs]
        for near, far in pairs:
            near.close()
            far.close()
    del results, back, items
    stats = fdpass.store_stats()
    facts |= {"made": stats.made, "claims": stats.claims, "unclaimed": stats.unclaimed}
    _store.stop()
    _claims.close_connections()
    facts["left"] = [os.readlink(f"/proc/self/fd/{fd}") for fd in open_descriptors() if fd not in before]
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
