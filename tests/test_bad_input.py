"""Input as people have it, through the command: what is bad ends as one line, exit code 2, nothing half-written."""
import os

import numpy as np
import pytest
from PIL import Image

from ophav_nb.cli import main
from ophav_nb.detect import Detector
from ophav_nb.media import read_image, resize, write_image, write_video


@pytest.fixture(scope="module")
def astronaut():
    return read_image("astronaut")


@pytest.fixture(scope="module")
def portrait(astronaut):
    return np.ascontiguousarray(astronaut[:280, 90:370])


def refused(capsys, out, *argv, left=False):
    """The one line that the command says; nothing is left behind."""
    assert main([*map(str, argv), "--out", str(out)]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ophav: ")]
    assert len(err) == 1 and len(err[0]) < 400, err
    if not left: assert not out.exists()
    elif out.is_dir(): assert not list(out.rglob("*.partial")) and not (out/"video.mp4").exists()
    return err[0]


def make_picture(kind, folder, astronaut, portrait):
    path = folder/"portrait.jpg"
    if kind == "no face": write_image(path, np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8))
    if kind == "flat": write_image(path, np.full((300, 300, 3), 128, np.uint8))
    if kind == "animal":
        skimage_data = pytest.importorskip("skimage.data")
        try: write_image(path, skimage_data.chelsea())
        except (OSError, ImportError): pytest.skip("the picture of the cat is not in this scikit-image")
    if kind == "several": write_image(path, np.concatenate([portrait, portrait[:, ::-1]], 1))
    if kind == "40 px face":   # the astronaut's face is 95 px wide
        small, scene = resize(portrait, 280*40//95), np.full((400, 400, 3), 180, np.uint8)
        scene[100:100 + small.shape[0], 100:100 + small.shape[1]] = small
        write_image(path, scene)
    if kind == "text": path.write_text("Dear sir")
    if kind == "truncated": write_image(path, portrait); path.write_bytes(path.read_bytes()[:5000])
    if kind == "empty": path.write_bytes(b"")
    if kind == "folder": path.mkdir()
    return path


@pytest.mark.parametrize("kind, part", [
    ("no face", "no face"), ("flat", "no face"), ("animal", "face"), ("several", "--face"), ("40 px face", "px wide"), ("text", "JPEG or PNG"),
    ("truncated", "truncated"), ("empty", "is empty; copy or download it again"), ("folder", "folder"), ("missing", "no such file")])
def test_bad_portraits(tmp_path, capsys, astronaut, portrait, kind, part):
    assert part in refused(capsys, tmp_path/"run", "create", make_picture(kind, tmp_path, astronaut, portrait), "--preset", "smoke")


@pytest.mark.parametrize("option", [("--preset", "fast"), ("--head", "big"), ("--restorer", "magic"), ("--backend", "abacus"), ("--animator", "hand"),
                                    ("--matte", "x"), ("--parser", "x"), ("--rounds", "-1"), ("--face", "9"), ("--face", "x"), ("--device", "tpu"),
                                    ("--motion", "lost.mp4"), ("--motion", "dance"), ("--coarse", "lost.mp4")])
def test_bad_options(tmp_path, capsys, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "smoke"] if option[0] != "--preset" else []
    late = option[0] in ("--motion", "--coarse", "--animator")   # what was complete before these were looked at may stay
    refused(capsys, tmp_path/"run", "create", "astronaut", *arguments, *option, left=late)


@pytest.mark.parametrize("option", ["--motion", "--coarse"])
@pytest.mark.parametrize("kind", ["text", "truncated"])
def test_bad_films(tmp_path, capsys, portrait, option, kind):
    film = tmp_path/"film.mp4"
    if kind == "text": film.write_text("Dear sir")
    else:
        data = write_video(film, [portrait[:64, i:i + 64] for i in range(60)]).read_bytes()
        film.write_bytes(data[:len(data)*2//3])
    assert "film.mp4" in refused(capsys, tmp_path/"run", "create", "astronaut", "--preset", "smoke", option, film, left=True)


def test_bad_folders(tmp_path, capsys):
    (tmp_path/"file").write_text("")
    (tmp_path/"photos").mkdir(); (tmp_path/"photos"/"cat.jpg").write_text("")
    for out in (tmp_path/"file", tmp_path/"file"/"run", tmp_path/"photos"):
        refused(capsys, out, "create", "astronaut", "--preset", "smoke", left=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "photos"] and os.listdir(tmp_path/"photos") == ["cat.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path, capsys):
    tmp_path.chmod(0o555)
    assert "permission" in refused(capsys, tmp_path/"run", "create", "astronaut", "--preset", "smoke")


@pytest.mark.parametrize("argv", [["evaluate", "--clip", "lost.mp4"], ["animate", "lost", "--motion", "talk"], ["batch", "lost.yaml"]])
def test_other_commands(tmp_path, capsys, argv): refused(capsys, tmp_path/("out.mp4" if argv[0] == "animate" else "out"), *argv)


@pytest.mark.parametrize("kind", ["turned", "grey", "cmyk", "rgba", "16 bit", "200 px", "8000 px"])
def test_good_portraits(tmp_path, portrait, kind):
    """The same face is found in every form that people store it in."""
    image, path, scale = Image.fromarray(portrait), tmp_path/"portrait.png", 1.
    if kind == "turned":
        exif = Image.Exif(); exif[0x0112] = 8
        path = tmp_path/"portrait.jpg"
        image.transpose(Image.Transpose.ROTATE_270).save(path, exif=exif)
    elif kind == "grey": image.convert("L").save(path)
    elif kind == "cmyk": path = tmp_path/"portrait.jpg"; image.convert("CMYK").save(path)
    elif kind == "rgba": image.putalpha(255); image.save(path)
    elif kind == "16 bit": Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16)*257).save(path)
    else:
        size = int(kind.split()[0])
        path, scale = tmp_path/"portrait.jpg", min(size, 4096)/280
        image.resize((size, size), Image.Resampling.BILINEAR).save(path)
    detector = Detector()
    expected, found = detector.one(portrait), detector.one(read_image(path))
    between_eyes = np.linalg.norm(expected.landmarks[33, :2] - expected.landmarks[263, :2])
    off = np.linalg.norm(found.landmarks[:, :2]/scale - expected.landmarks[:, :2], axis=1).mean()
    assert off < .05*between_eyes, off/between_eyes


def test_a_film_in_the_portraits_place(tmp_path, capsys, astronaut):
    film = write_video(tmp_path/"me and you.mp4", [astronaut]*3, 25)
    said = refused(capsys, tmp_path/"run", "create", film, "--preset", "smoke")
    assert "is a film; give a picture" in said and "ffmpeg -i 'me and you.mp4'" in said


def test_a_bad_coarse_film_leaves_older_parts_as_they_are(tmp_path, capsys, astronaut):
    from ophav_nb.run import Run
    run = Run(tmp_path/"run", dict(portrait="astronaut"))
    run.make("motion", lambda folder: (folder/"old").touch())
    film = write_video(tmp_path/"a.mp4", [astronaut]*3, 25)
    assert main(["create", "astronaut", "--coarse", str(film), "--motion", "range", "--preset", "smoke", "--out", str(run.folder)]) == 2
    assert "has only 3 frames" in capsys.readouterr().err and Run.open(run.folder).has("motion") and Run.open(run.folder).params == dict(portrait="astronaut")
