"""All metadata is in pyproject.toml; cffi has no other hook than this keyword."""

import sys

from setuptools import setup

modules = ["_native/build_ffi.py:ffibuilder"]
# The command's load generator is made of epoll and timerfd, which only Linux has.
if sys.platform == "linux":
    modules.append("_native/bench/build_ffi.py:ffibuilder")

setup(cffi_modules=modules, options={"bdist_wheel": {"py_limited_api": "cp311"}})
