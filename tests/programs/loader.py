"""A DataLoader with two workers, started by fork or spawn, whose tensors come by register(): a program for test_programs.py.

python loader.py fork|spawn; its output is a JSON object.
"""

import json
import os
import sys
from multiprocessing import resource_tracker

import torch
from facts import open_descriptors, sharer_ran
from torch.utils.data import DataLoader, Dataset

import fdpass
from fdpass import _claims


class Facts(Dataset):
    """Each item: a tensor of its number, and which process made it, what its store did so far, whether the standard one served."""

    def __len__(self):
        return 48

    def __getitem__(self, number):
        stats = fdpass.store_stats()
        return torch.full((16,), float(number)), torch.tensor([os.getpid(), stats.made, stats.claims, sharer_ran()])


def main():
    torch.set_num_threads(1)
    fdpass.register()
    loader = DataLoader(Facts(), batch_size=4, num_workers=2, multiprocessing_context=sys.argv[1])
    resource_tracker.ensure_running()
    before = open_descriptors()
    numbers, facts = [], []
    for tensors, about in loader:
        assert tensors.is_shared()
        numbers += tensors[:, 0].tolist()
        facts += about.tolist()
    del tensors, about
    # One to each worker, kept for the next claim.
    _claims.close_connections()
    assert open_descriptors() == before
    assert numbers == list(range(48)), numbers
    workers = {pid: [made, claims] for pid, made, claims, _ in facts if pid != os.getpid()}
    sharers = any(sharer for *_, sharer in facts) or sharer_ran()
    print(json.dumps({"workers": list(workers.values()), "sharer": sharers}))


if __name__ == "__main__":
    main()
