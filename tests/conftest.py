"""Shared by all tests: the package before torch, so that its thread policy holds; no progress bars.

`OPHAV_TEST_DEVICE=cuda pytest -k golden tests` asks the golden outputs of other people's networks of a GPU."""
import os

os.environ.setdefault("OPHAV_QUIET", "1")
import ophav_nb  # noqa: E402,F401
import torch  # noqa: E402

if device := os.environ.get("OPHAV_TEST_DEVICE"):
    from ophav_nb.nets.blocks import precision
    torch.set_default_device(device)
    precision(device, False).__enter__()      # as networks are called
