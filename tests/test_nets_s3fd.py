"S3FD: maps and boxes equal to the public implementation; fails when broken; loads the authors' file."
import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb.nets.s3fd import MEAN, S3FD, STRIDES, decode, find_faces, load_s3fd, overlap, thin_out
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight


@pytest.fixture(scope="module")
def net(): return golden_fill.fill_golden(S3FD(), "s3fd")


@torch.inference_mode()
def outputs(net):
    found = net(golden_fill.drawn_picture("s3fd", (1, 3, 160, 192), 0, 255) - torch.tensor(MEAN)[:, None, None])
    made_up = golden_fill.drawn_uniform("s3fd.conf", (1, 2560), .1, .9)[0]
    boxes = torch.cat([decode(boxes, stride)[0] for (_, boxes), stride in zip(found, STRIDES)])
    likely = torch.full((len(boxes),), .5)
    first = 0
    for scores, _ in found:      # as long as a whole map's cells are left, they take made-up likelihoods
        n = scores[0, 0].numel()
        if first + n > len(made_up): break
        likely[first:first + n] = made_up[first:first + n]
        first += n
    maps = {f"{kind}{i}": t for i, pair in enumerate(found, 1) for kind, t in zip(("cls", "reg"), pair)}
    return maps | {"boxes_fabricated_conf": torch.cat([boxes, likely[:, None]], 1), "n_cells": torch.tensor([float(len(boxes))])}


def test_golden(net): golden_fill.golden_on_threads("s3fd", lambda: outputs(net))


def test_a_broken_layer_fails(net):
    net.conv4_3_norm.forward = lambda x: torch.nn.functional.normalize(x)*net.conv4_3_norm.weight[:, None, None]*1.001
    try: shares = golden_fill.beyond("s3fd", outputs(net))
    finally: del net.conv4_3_norm.forward
    assert shares["cls2"] > 1 and shares["cls1"] <= 1


def test_other_sizes_and_batches(net):
    x = torch.randn(2, 3, 96, 130, generator=torch.Generator().manual_seed(1))*60
    with torch.inference_mode(): together, alone = net(x), [net(i[None]) for i in x]
    for i, pair in enumerate(together):
        for j, t in enumerate(pair): torch.testing.assert_close(t, torch.cat([a[i][j] for a in alone]), rtol=1e-3, atol=1e-4)


def test_thinning_against_the_definition():
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(200, 2, generator=g)*100
    boxes, scores = torch.cat([corner, corner + 10 + 30*torch.rand(200, 2, generator=g)], 1), torch.rand(200, generator=g)
    stay = []
    for i in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[[i]], boxes[[j]]) <= .3 for j in stay): stay.append(i)
    assert thin_out(boxes, scores).tolist() == stay and 5 < len(stay) < 100
    assert len(thin_out(boxes[:0], scores[:0])) == 0


def test_finding_faces(net):
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    found = find_faces(net, image, threshold=.4)
    assert found.shape[1] == 5 and (found[:, 4] > .4).all() and (np.diff(found[:, 4]) <= 0).all() and found.dtype == np.float32
    assert len(find_faces(net, image, threshold=.9999)) == 0
    assert find_faces(net, image, threshold=.4, half=True).dtype == np.float32


def test_the_authors_file(net, tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    with pytest.raises(InputError, match="s3fd-619a316812.pth"): load_s3fd()
    torch.save(net.state_dict(), tmp_path/"s3fd.pth", _use_new_zipfile_serialization=False)
    assert add_weight(tmp_path/"s3fd.pth")[0] == "s3fd"
    assert all(torch.equal(a, b) for a, b in zip(load_s3fd().state_dict().values(), net.state_dict().values()))


@pytest.mark.parametrize("seed, size", [(1, (96, 160)), (2, (135, 70))])
def test_beside_face_alignment(seed, size):
    "The same network as face_alignment's: other weights, other sizes; and the same thinning."
    theirs = pytest.importorskip("face_alignment.detection.sfd.net_s3fd").s3fd().eval()
    ours = golden_fill.fill_otherwise(S3FD(), "s3fd", seed=seed)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = golden_fill.drawn_picture(f"s3fd {seed}", (2, 3, *size), -110, 140)
    with torch.inference_mode(): found, known = [t for pair in ours(x) for t in pair], theirs(x)
    for a, b in zip(found, known): torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    from face_alignment.detection.sfd.bbox import nms
    corner = torch.rand(100, 2, generator=torch.Generator().manual_seed(seed))*100
    rows = torch.cat([corner, corner + 35, torch.linspace(.1, .9, 100)[:, None]], 1)
    assert thin_out(rows[:, :4], rows[:, 4]).tolist() == [int(i) for i in nms(rows.numpy(), .3)]
