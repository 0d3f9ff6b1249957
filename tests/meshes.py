"Meshes that several tests use."
import numpy as np


def soup(rng, V=300, F=800):
    "A mesh with everything bad in it: crossing, repeated, needle-like and empty triangles."
    v, f = rng.normal(size=(V, 3)).astype(np.float32)*.1, rng.integers(0, V, (F, 3)).astype(np.int32)
    f[:20, 1] = f[:20, 0]                        # an edge
    f[20:30] = f[20:30, :1]                      # a point
    v[f[30:40, 2]] = (v[f[30:40, 0]] + v[f[30:40, 1]])/2   # nearly straight
    f[40:50] = f[50:60]                          # twice
    return v, f
