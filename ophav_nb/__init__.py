"""One portrait in, an animatable 3D neural head avatar out (OPHAvatars), as notebooks."""
__version__ = "0.1.0"

import os as _os
import sys as _sys
import warnings as _warnings


def _set_threads() -> None:
    """torch and numba keep separate OpenMP pools: make idle threads sleep, and give both the same size."""
    if "torch" in _sys.modules and _os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        _warnings.warn("torch was imported before ophav_nb: its idle threads may spin and slow everything down on a busy "
                       "machine; import ophav_nb first, or set OMP_WAIT_POLICY=PASSIVE", stacklevel=3)
    _os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _os.environ.setdefault("GOMP_SPINCOUNT", "0")
    threads = _os.environ.get("OPHAV_THREADS")
    if threads:
        _os.environ.setdefault("OMP_NUM_THREADS", threads)
        _os.environ.setdefault("NUMBA_NUM_THREADS", threads)


_set_threads()
