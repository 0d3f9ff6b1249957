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


def lenses(head):
    "Two flat rings before a head's eyes, as glasses are worn."
    from ophav_nb.head import Worn
    t, n = np.linspace(0, 2*np.pi, 24, endpoint=False), 24
    ring = np.stack([np.cos(t), np.sin(t), 0*t], 1)
    points = np.concatenate([eye + np.float32([0, 0, .034]) + r*ring for eye in head.joint_positions()[3:].numpy() for r in (.019, .024)])
    k, after = np.arange(n), (np.arange(n) + 1) % n
    band = np.concatenate([np.stack([k, n + k, n + after], 1), np.stack([k, n + after, after], 1)])
    return Worn(points.astype(np.float32), np.concatenate([band, 2*n + band]).astype(np.int32))
