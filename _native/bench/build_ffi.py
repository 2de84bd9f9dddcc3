"""Builds fdpass_bench/_loadgen from the C beside this file. cffi parses the same header that the C includes."""

import os
import re
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
SOURCES = ["loadgen.c", "schedule.c", "answer.c", "histogram.c", "nullserver.c", "clock.c"]

ffibuilder = cffi.FFI()
_marked = re.search(r"/\* cffi: begin \*/(.*)/\* cffi: end \*/", (HERE / "loadgen.h").read_text(), re.S)
assert _marked is not None
ffibuilder.cdef(_marked.group(1))

# -Wno-* only for what cffi itself generates; the sources alone are compiled with more by the continuous integration.
_flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-Wno-unused-parameter", "-Wno-cast-function-type"]
_link: list[str] = []
if os.environ.get("FDPASS_BUILD_SANITIZE"):
    _flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
    _link += ["-fsanitize=address,undefined"]

# Relative to the project's root: setuptools refuses absolute paths, and the sdist has the same layout.
ffibuilder.set_source(
    "fdpass_bench._loadgen",
    '#include "loadgen.h"',
    sources=[f"_native/bench/{name}" for name in SOURCES],
    include_dirs=["_native/bench"],
    depends=["_native/bench/loadgen.h"],
    libraries=["m"],
    extra_compile_args=_flags,
    extra_link_args=_link,
)
