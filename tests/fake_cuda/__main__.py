"""Load the device, then everything that imports torch."""

import importlib

from tests.fake_cuda import device

device.load()
importlib.import_module("tests.fake_cuda.table").main()
