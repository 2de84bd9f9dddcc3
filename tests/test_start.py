"""The start method of a serving program: the variable decides, a hazard turns fork into spawn with one warning, torch is never imported."""

import json

import pytest

import fdpass

#: In a program of its own, since the warning is given once in a process and threads and modules are the process's.
PROGRAM = """
import json, sys, warnings
import fdpass
{before}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    methods = [fdpass.get_context({argument}).get_start_method() for _ in range(3)]
{after}
print(json.dumps([methods[0] if len(set(methods)) == 1 else methods, [[one.category.__name__, str(one.message)] for one in said],
    sorted({{"torch", "ray"}} & set(sys.modules))]))
"""

BUSY = """
import threading
done = threading.Event()
thread = threading.Thread(target=done.wait, name={name!r})
thread.start()
"""
LEAVE = "done.set(); thread.join()"

#: The CPU build of torch cannot initialise either, so the modules are stand-ins; "import torch" itself would fail.
TORCH = """
import types
for name, initialised in {modules!r}.items():
    module = types.ModuleType(name)
    module.is_initialized = lambda initialised=initialised: initialised
    sys.modules[name] = module
"""

RAY = """
import types
ray = types.ModuleType("ray")
ray.is_initialized = lambda: {initialised}
ray.WORKER_MODE, ray.SCRIPT_MODE = 1, 0
ray._private = types.SimpleNamespace(worker=types.SimpleNamespace(global_worker=types.SimpleNamespace(mode={mode})))
sys.modules["ray"] = ray
"""


@pytest.fixture
def chosen(run_python, monkeypatch):
    """chosen(...): (start method, warnings, modules loaded) of a program in which get_context is called three times."""
    monkeypatch.delenv("FDPASS_START_METHOD", raising=False)

    def choose(before="", after="", argument=""):
        return tuple(json.loads(run_python(PROGRAM.format(before=before, after=after, argument=argument)).stdout))

    return choose


def test_a_plain_program_forks_without_a_word(chosen):
    assert chosen() == ("fork", [], [])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_variable_decides(chosen, monkeypatch, method):
    monkeypatch.setenv("FDPASS_START_METHOD", method)
    assert chosen() == (method, [], [])


def test_an_empty_variable_is_none(chosen, monkeypatch):
    monkeypatch.setenv("FDPASS_START_METHOD", "")
    assert chosen() == ("fork", [], [])


@pytest.mark.parametrize("value", ["Fork", "thread", "spawn ", "fork,spawn"])
def test_any_other_value_is_an_error_that_lists_them(monkeypatch, value):
    monkeypatch.setenv("FDPASS_START_METHOD", value)
    with pytest.raises(ValueError, match=rf"FDPASS_START_METHOD='{value}' is none of fork, spawn, forkserver"):
        fdpass.get_context()
    with pytest.raises(ValueError, match=rf"start method '{value}' is none of fork, spawn, forkserver"):
        fdpass.get_context(value)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_an_argument_is_taken_at_its_word(chosen, monkeypatch, method):
    monkeypatch.setenv("FDPASS_START_METHOD", "thread")
    assert chosen(BUSY.format(name="busy"), LEAVE, repr(method)) == (method, [], [])


@pytest.mark.parametrize("variable", ["", "fork"])
def test_another_thread_forces_spawn_with_one_warning(chosen, monkeypatch, variable):
    monkeypatch.setenv("FDPASS_START_METHOD", variable)
    method, ((category, text),), _ = chosen(BUSY.format(name="busy-bee"), LEAVE)
    assert method == "spawn"
    assert category == "RuntimeWarning"
    assert "started with spawn" in text
    assert "1 other thread running (busy-bee)" in text


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_where_nothing_forks_no_thread_matters(chosen, monkeypatch, method):
    monkeypatch.setenv("FDPASS_START_METHOD", method)
    assert chosen(BUSY.format(name="busy"), LEAVE) == (method, [], [])


def test_a_thread_of_our_own_is_no_hazard(chosen):
    assert chosen(BUSY.format(name="fdpass-supervisor"), LEAVE) == ("fork", [], [])


@pytest.mark.parametrize(
    ("modules", "word"),
    [({"torch.cuda": True, "torch.xpu": False}, "CUDA is initialised"), ({"torch.cuda": False, "torch.xpu": True}, "XPU is initialised")],
)
def test_an_initialised_accelerator_forces_spawn(chosen, modules, word):
    method, ((_, text),), loaded = chosen(TORCH.format(modules=modules))
    assert method == "spawn"
    assert word in text
    # Seen where it lies; torch itself was not loaded.
    assert loaded == []


def test_every_reason_is_named_in_the_one_warning(chosen):
    modules = {"torch.cuda": True, "torch.xpu": True}
    before = TORCH.format(modules=modules) + RAY.format(initialised=True, mode=1) + BUSY.format(name="busy")
    method, ((_, text),), _ = chosen(before, LEAVE)
    assert method == "spawn"
    for word in ("CUDA", "XPU", "Ray worker", "(busy)"):
        assert word in text


def test_an_accelerator_that_is_not_initialised_is_no_hazard(chosen):
    assert chosen(TORCH.format(modules={"torch.cuda": False, "torch.xpu": False})) == ("fork", [], [])


def test_a_half_loaded_module_is_no_hazard(chosen):
    broken = "import types\nmodule = sys.modules['torch.cuda'] = types.ModuleType('torch.cuda')\n"
    assert chosen(broken) == ("fork", [], [])
    assert chosen(broken + "module.is_initialized = lambda: 1 / 0") == ("fork", [], [])


def test_a_ray_worker_forces_spawn(chosen):
    method, ((_, text),), _ = chosen(RAY.format(initialised=True, mode=1))
    assert method == "spawn"
    assert "Ray worker" in text


@pytest.mark.parametrize(("initialised", "mode"), [(False, 1), (True, 0), (True, None)])
def test_ray_without_being_its_worker_is_no_hazard(chosen, initialised, mode):
    assert chosen(RAY.format(initialised=initialised, mode=mode)) == ("fork", [], ["ray"])
