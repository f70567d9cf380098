#!/usr/bin/env python3
"""make_data.py STAMP: writes the tiny models that tests run into the folder `data` beside STAMP, then STAMP."""

import os
import shutil
import sys

import test_golden

stamp = os.path.abspath(sys.argv[1])
folder = os.path.join(os.path.dirname(stamp), "data")
shutil.rmtree(folder, ignore_errors=True)
test_golden.make_data(folder)
open(stamp, "w").close()
