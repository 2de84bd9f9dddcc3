"""A producer and a receiver of torch tensors under spawn, sharing strategy file_descriptor: a program for test_programs.py.

python tensors.py MODE registered|plain; the last line of its output is a JSON object of what the receiver saw.
"""

import json
import os
import resource
import sys

import torch
import torch.multiprocessing as mp
from facts import open_descriptors, sharer_ran

import fdpass


def keep(queue, answers, limit):
    """Keeps every tensor until something fails, lets all go then, and goes on. An error that names no numbers ends it."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    received, errors, kept = 0, [], []
    while True:
        try:
            tensor = queue.get()
        except fdpass.DescriptorsLostError as error:
            errors.append([str(error), error.needed, error.got, error.limit, len(kept)])
            kept.clear()
            continue
        except RuntimeError as error:
            answers.put({"died": str(error), "kept": len(kept)})
            return
        if tensor is None:
            break
        assert tensor.tolist() == [float(received + len(errors))] * 16, tensor
        received += 1
        kept.append(tensor)
    answers.put({"received": received, "errors": errors})


def take(queue, answers):
    """Loads what is one item."""
    tensors = queue.get()
    assert [tensor.tolist() for tensor in tensors] == [[float(number)] * 16 for number in range(len(tensors))]
    answers.put({"received": len(tensors)})


def limit(context, queue, answers):
    """The receiver may have 256 descriptors and keeps what it gets."""
    receiver = context.Process(target=keep, args=(queue, answers, 256))
    receiver.start()
    for number in range(600):
        queue.put(torch.full((16,), float(number)))
    queue.put(None)
    facts = answers.get()
    if "died" in facts:
        queue.cancel_join_thread()
    receiver.join()
    return {**facts, "exitcode": receiver.exitcode}


def ahead(context, queue, answers):
    """The producer has 700 tensors on their way, which it keeps as well: 1400 descriptors, at a soft limit of 1024."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    kept = [torch.full((16,), float(number)) for number in range(700)]
    queue.put(kept)
    # Nobody receives yet.
    while fdpass.store_stats().unclaimed < len(kept):
        os.sched_yield()
    descriptors = len(open_descriptors())
    receiver = context.Process(target=take, args=(queue, answers))
    receiver.start()
    facts = answers.get()
    receiver.join()
    return {**facts, "exitcode": receiver.exitcode, "descriptors": descriptors}


def main():
    mode, how = sys.argv[1:]
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"
    torch.set_num_threads(1)
    if how == "registered":
        fdpass.register(linger=0)
    context = mp.get_context("spawn")
    queue, answers = context.Queue(), context.SimpleQueue()
    facts = {"limit": limit, "ahead": ahead}[mode](context, queue, answers)
    stats = fdpass.store_stats()
    print(json.dumps({**facts, "made": stats.made, "claims": stats.claims, "unclaimed": stats.unclaimed, "sharer": sharer_ran()}))


if __name__ == "__main__":
    main()
