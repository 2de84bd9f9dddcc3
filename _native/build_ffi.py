"""Builds fdpass/_native from the C beside this file. cffi parses the same header that the C includes."""

import os
import re
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
SOURCES = ["ancillary.c", "socket.c", "watch.c", "store.c", "claim.c", "dispatcher.c", "platform.c"]

ffibuilder = cffi.FFI()
_marked = re.search(r"/\* cffi: begin \*/(.*)/\* cffi: end \*/", (HERE / "fdpass_native.h").read_text(), re.S)
assert _marked is not None
ffibuilder.cdef(_marked.group(1))

# -Wno-* only for what cffi itself generates; the sources alone are compiled with more by the continuous integration.
_flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-Wno-unused-parameter", "-Wno-cast-function-type"]
_macros: list[tuple[str, str | None]] = []
_link: list[str] = ["-pthread"]
if os.environ.get("FDPASS_BUILD_SANITIZE"):
    _flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
    _link += ["-fsanitize=address,undefined"]
if os.environ.get("FDPASS_BUILD_FALLBACK"):
    _macros += [("FDP_FORCE_FALLBACK", None)]

# Relative to the project's root: setuptools refuses absolute paths, and the sdist has the same layout.
ffibuilder.set_source(
    "fdpass._native",
    '#include "fdpass_native.h"',
    sources=[f"_native/{name}" for name in SOURCES],
    include_dirs=["_native"],
    depends=["_native/fdpass_native.h", "_native/platform.h", "_native/packet.h"],
    define_macros=_macros,
    extra_compile_args=_flags,
    extra_link_args=_link,
)
