"""The balance check itself: a test that leaks on purpose is failed by it, with the name of what leaked; one that does not leak passes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

SUITE = """
import os, socket, subprocess
import pytest

kept = []

def test_clean(unix_pair, marked):
    os.close(os.dup(marked("x")))
    subprocess.run(["true"], check=True)

def test_leaks_a_descriptor():
    kept.append(os.open("/dev/zero", os.O_RDONLY))

def test_leaks_a_cycle_that_only_the_collector_sees():
    class Ring: pass
    ring = Ring()
    ring.self, ring.fd = ring, os.memfd_create("in-a-ring")

def test_closes_what_is_not_its_own():
    os.close(kept.pop())

def test_replaces(tmp_path):
    os.dup2(borrowed, STDERR_COPY)

def test_leaves_a_child():
    kept.append(subprocess.Popen(["sleep", "1000"]))

def test_collects_the_child():
    kept[-1].kill()
    kept.pop().wait()

@pytest.mark.allow_fd_growth
def test_grows_by_leave():
    os.memfd_create("allowed")

def test_clean_again(fd_count):
    before = fd_count()
    fd = os.dup(0)
    assert fd_count() == before + 1
    os.close(fd)
    assert fd_count() == before

STDERR_COPY = os.dup(2)
borrowed = os.open("/dev/full", os.O_WRONLY)
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The output of a pytest process that ran SUITE under this directory's conftest.py."""
    place = tmp_path_factory.mktemp("suite")
    shutil.copy(HERE / "conftest.py", place)
    (place / "test_suite.py").write_text(SUITE)
    (place / "pytest.ini").write_text(
        "[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider -W error\nmarkers = allow_fd_growth: .\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-rA", "--color=no", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=place)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["test_clean", "test_collects_the_child", "test_grows_by_leave", "test_clean_again"])
def test_a_balanced_test_passes(report, name):
    assert f"PASSED test_suite.py::{name}" in report
    assert f"ERROR test_suite.py::{name}" not in report


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("test_leaks_a_descriptor", r"leaked: descriptor \d+, /dev/zero"),
        ("test_leaks_a_cycle_that_only_the_collector_sees", r"leaked: descriptor \d+, /memfd:in-a-ring \(deleted\)"),
        ("test_closes_what_is_not_its_own", r"closed, but not the test's own: descriptor \d+, /dev/zero"),
        ("test_replaces", r"replaced: descriptor \d+, was .*, is /dev/full"),
        ("test_leaves_a_child", r"left running or not waited for: process \d+, sleep 1000"),
    ],
)
def test_an_unbalanced_test_is_failed_and_told_why(report, name, line):
    assert f"ERROR test_suite.py::{name}" in report
    section = report.partition(f"ERROR at teardown of {name} ")[2].partition("\n___")[0]
    assert "the test is out of balance" in section
    assert re.search(line, section), section
