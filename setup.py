"""All metadata is in pyproject.toml; cffi has no other hook than this keyword."""

from setuptools import setup

setup(cffi_modules=["_native/build_ffi.py:ffibuilder"], options={"bdist_wheel": {"py_limited_api": "cp311"}})
