"""Shared by all tests: the package before torch, so that its thread policy holds; no progress bars."""
import os

os.environ.setdefault("OPHAV_QUIET", "1")
import ophav_nb  # noqa: E402,F401
