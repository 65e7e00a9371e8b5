"""File systems made for a test: in an image of their own, or in memory. Needs root; skips where one cannot be had."""

import contextlib
import shutil
import subprocess

import pytest

MIB = 1 << 20

#: name -> (command that makes one in an image, the image's size, mount options). A cut of the power must find what the
#: saver sent to the disk and no more: ext4 is told not to write back by itself meanwhile.
IN_IMAGES = {
    "ext4": (("mkfs.ext4", "-q"), 64 * MIB, ("commit=300",)),
    "ext4 data=journal": (("mkfs.ext4", "-q"), 64 * MIB, ("commit=300", "data=journal")),
    "ext2": (("mkfs.ext2", "-q"), 64 * MIB, ()),
    "xfs": (("mkfs.xfs", "-q"), 300 * MIB, ()),
    "btrfs": (("mkfs.btrfs", "-q"), 128 * MIB, ("commit=300",)),
}
NAMES = [*IN_IMAGES, "tmpfs", "overlay", "overlay on tmpfs"]
IN_EVERY_RUN = ("ext4", "tmpfs", "overlay")


def each(*names):
    """Parameters for the file systems `names`; most of them wait for --long."""
    return [pytest.param(name, marks=[] if name in IN_EVERY_RUN else pytest.mark.long) for name in names]


def _run(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{' '.join(map(str, command))}: {done.stderr}")


def make_image(name, image):
    """Makes the file system `name` in the file `image`."""
    make, nbytes, _ = IN_IMAGES[name]
    with open(image, "wb") as file:
        file.truncate(nbytes)
    _run(*make, image)


@contextlib.contextmanager
def mounted(kind, directory, *options, source="none"):
    """A file system at `directory`, which is made, in the block."""
    directory.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", kind, *(["-o", ",".join(options)] if options else []), source, directory)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@contextlib.contextmanager
def mounted_image(name, image, directory):
    kind, options = name.split()[0], IN_IMAGES[name][2]
    with mounted(kind, directory, "loop", *options, source=image):
        yield directory


@contextlib.contextmanager
def made(name, directory, *, nbytes=64 * MIB):
    """The file system `name`, empty, somewhere in `directory`; `nbytes` is for those in memory."""
    with contextlib.ExitStack() as stack:
        if name in IN_IMAGES:
            make_image(name, directory / "image")
            yield stack.enter_context(mounted_image(name, directory / "image", directory / "mount"))
            return
        if name == "tmpfs":
            yield stack.enter_context(mounted("tmpfs", directory / "mount", f"size={nbytes}"))
            return
        # Not on top of an overlay, which the test's own directory may be: it takes no other as its upper layer.
        if name == "overlay on tmpfs":
            below = stack.enter_context(mounted("tmpfs", directory / "below", f"size={nbytes}"))
        else:
            make_image("ext4", directory / "image")
            below = stack.enter_context(mounted_image("ext4", directory / "image", directory / "below"))
        parts = {part: below / part for part in ("lower", "upper", "work")}
        for path in parts.values():
            path.mkdir()
        options = [f"{part}dir={path}" for part, path in parts.items()]
        yield stack.enter_context(mounted("overlay", directory / "mount", *options))
