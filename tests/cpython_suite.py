"""CPython's own tests of multiprocessing, from the running interpreter, under one start method: a program for test_cpython_suite.py."""

import sys
import unittest

from test import _test_multiprocessing

if __name__ in ("__main__", "__mp_main__"):
    _test_multiprocessing.install_tests_in_module_dict(globals(), sys.argv[1])

if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[2:]])
