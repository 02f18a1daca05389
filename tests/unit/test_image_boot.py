"""Booting from a disk image: which entries there are, which one is taken, and what is read of it."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from chv import boot, image_cli
from chv.boot.image import Image, LoadedFile, open_image
from chv.errors import ImageError

from .boot_images import vmlinux
from .disk_images import (
    ENTRY,
    ESP,
    INITRD,
    KERNEL,
    LINUX,
    XBOOTLDR,
    disk,
    esp,
    gpt,
    mbr,
    pe,
    unified,
    usual_files,
)

SHAPES: list[dict[str, Any]] = [
    {"bits": 12},
    {"bits": 12, "per_cluster": 8},
    {"bits": 16},
    {"bits": 16, "stride": 2},
    {"bits": 32},
    {"bits": 32, "sector": 4096},
    {"bits": 32, "stride": 3},
    {"bits": 32, "fats": 1},
    {"bits": 32, "active": 1},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


def content(file: LoadedFile | None) -> bytes:
    assert file is not None
    data = os.pread(file.fileno(), file.size + 1, 0)
    assert len(data) == file.size
    return data


def snippet(**keys: str) -> bytes:
    keys = {"linux": "/EFI/debian/kernel-6.12", **keys}
    return "".join(f"{key.replace('_', '-')} {value}\n" for key, value in keys.items()).encode()


def opened(path: Path, files: Mapping[str, bytes] | None = None) -> Image:
    """An image with the usual files and those in ``files``."""
    path.write_bytes(disk({**usual_files(), **(files or {})}))
    return open_image(path)


# -- from the image to a kernel ----------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_and_initrd_are_read(path: Path, shape: dict[str, Any]) -> None:
    path.write_bytes(disk(**shape))
    with open_image(path) as image:
        loaded = image.load()
    with loaded:
        assert content(loaded.kernel) == KERNEL
        assert content(loaded.initramfs) == INITRD
        assert loaded.cmdline == "root=LABEL=root ro quiet"
        assert loaded.entry == image.default


@pytest.mark.parametrize(
    ("data", "source"),
    [
        (esp(bits=12), "/loader"),
        (esp(bits=16), "/loader"),
        (mbr([(0x83, 1, 1), (0xEF, 3, 2000)]) + bytes(1024) + esp(), "partition 2: /loader"),
        (mbr([(0xEA, 1, 2000)]) + esp(), "partition 1: /loader"),
    ],
    ids=["FAT12 alone", "FAT16 alone", "MBR ef", "MBR ea"],
)
def test_without_a_guid_partition_table(path: Path, data: bytes, source: str) -> None:
    path.write_bytes(data.ljust(2003 * 512, b"\0"))
    with open_image(path) as image, image.load() as loaded:
        assert image.default.source == f"{source}/entries/debian-6.12.conf"
        assert content(loaded.kernel) == KERNEL


def test_what_is_loaded_can_be_booted(path: Path) -> None:
    kernel = vmlinux()
    with opened(path, {"EFI/debian/kernel-6.12": kernel}) as image, image.load() as loaded:
        prepared = boot.prepare(loaded.kernel, initramfs=loaded.initramfs, cmdline=loaded.cmdline)
    with prepared:  # the files stay although they were closed above
        assert prepared._kernel.source.read(0, len(kernel)) == kernel
        assert prepared._initramfs is not None
        assert prepared._initramfs.read(0, len(INITRD)) == INITRD


def test_what_is_loaded_cannot_be_changed(path: Path) -> None:
    with opened(path) as image, image.load() as loaded:
        with pytest.raises(PermissionError):
            os.pwrite(loaded.kernel.fileno(), b"x", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(loaded.kernel.fileno(), 0)


def test_nothing_stays_open(path: Path) -> None:
    path.write_bytes(disk())
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with open_image(path) as image, image.load() as loaded:
            loaded.close()
    path.write_bytes(disk({"EFI/Linux/a.efi": unified(KERNEL)[:-600]}))
    with open_image(path) as image, pytest.raises(ImageError):
        image.load()
    path.write_bytes(b"nothing")
    with pytest.raises(ImageError):
        open_image(path)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_several_initrds_are_put_behind_each_other_aligned(path: Path) -> None:
    entry = ENTRY.replace(b"initrd /EFI", b"initrd EFI/ucode\ninitrd EFI\\odd\ninitrd /EFI")
    files = {"EFI/ucode": b"u" * 8, "EFI/odd": b"odd", "loader/entries/debian-6.12.conf": entry}
    with opened(path, files) as image, image.load() as loaded:
        assert content(loaded.initramfs) == b"uuuuuuuu" + b"odd\0" + INITRD
        assert loaded.initramfs is not None
        where = f"{path}: partition 2 (EFI system partition)"
        assert loaded.initramfs.name == f"initrd {where}: EFI/ucode and 2 more"


def test_an_entry_without_initrd_and_options(path: Path) -> None:
    with opened(path, {"loader/entries/a.conf": snippet()}) as image, image.load(image.select("a")) as loaded:
        assert loaded.initramfs is None
        assert loaded.cmdline == ""


def test_bytes_of_options_that_are_no_utf8_reach_the_command_line(path: Path) -> None:
    with opened(path, {"loader/entries/a.conf": snippet() + b"options name=\xff\n"}) as image:
        assert image.select("a").options.encode("utf-8", "surrogateescape") == b"name=\xff"


def test_a_block_of_the_usual_size_is_read_in_one_go(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 MB in clusters of 512 bytes, behind each other: a few reads, not thousands."""
    big = bytes(range(256)) * 8192
    path.write_bytes(disk({**usual_files(), "EFI/debian/initrd-6.12": big}, clusters=5000))
    calls: list[int] = []
    real = os.preadv

    def counting(fd: int, buffers: Any, offset: int) -> int:
        calls.append(offset)
        return real(fd, buffers, offset)

    with open_image(path) as image:
        monkeypatch.setattr(os, "preadv", counting)
        with image.load() as loaded:
            assert content(loaded.initramfs) == big
    assert len(calls) < 20


# -- unified kernel images ---------------------------------------------------------------


def test_a_unified_kernel_image(path: Path) -> None:
    data = unified(KERNEL, initrd=INITRD, ucode=b"micro")
    path.write_bytes(disk({"EFI/Linux/debian-12.efi": data}))
    with open_image(path) as image, image.load() as loaded:
        entry = image.default
        assert (entry.id, entry.kind, entry.title) == ("debian-12.efi", "efi", "Debian 12")
        assert (entry.version, entry.sort_key) == ("12", "debian")
        assert entry.linux == "/EFI/Linux/debian-12.efi"
        assert content(loaded.kernel) == KERNEL
        assert content(loaded.initramfs) == b"micro\0\0\0" + INITRD
        assert loaded.cmdline == entry.options == "root=/dev/vda2 quiet"


@pytest.mark.parametrize("key", ["efi", "linux", "uki"])
def test_a_unified_kernel_image_that_an_entry_names(path: Path, key: str) -> None:
    entry = f"title T\n{key} /EFI/other/x.efi\noptions from=entry\n".encode()
    files = {"loader/entries/a.conf": entry, "EFI/other/x.efi": unified(KERNEL, initrd=INITRD)}
    with opened(path, files) as image, image.load(image.select("a")) as loaded:
        assert content(loaded.kernel) == KERNEL
        assert content(loaded.initramfs) == INITRD
        assert loaded.cmdline == "from=entry"


def test_the_command_line_of_a_unified_kernel_image_holds_where_the_entry_has_none(path: Path) -> None:
    files = {"loader/entries/a.conf": b"uki /x.efi\n", "x.efi": unified(KERNEL)}
    with opened(path, files) as image:
        assert image.select("a").options == "root=/dev/vda2 quiet"


def test_the_first_profile_of_a_unified_kernel_image(path: Path) -> None:
    sections = [
        (".linux", KERNEL),
        (".cmdline", b"base"),
        (".initrd", INITRD),
        (".profile", b"ID=a"),
        (".cmdline", b"first"),
        (".profile", b"ID=b"),
        (".cmdline", b"second"),
    ]
    path.write_bytes(disk({"EFI/Linux/a.efi": pe(sections)}))
    with open_image(path) as image, image.load() as loaded:
        assert loaded.cmdline == "first"
        assert content(loaded.initramfs) == INITRD


# -- the order and the default -----------------------------------------------------------


def test_the_default_of_loader_conf(path: Path) -> None:
    files = {"loader/entries/zzz.conf": snippet(), "loader/entries/debian-6.1.conf": snippet()}
    with opened(path, files) as image:
        assert [entry.id for entry in image.entries] == ["zzz.conf", "debian-6.12.conf", "debian-6.1.conf"]
        assert image.default.id == "debian-6.12.conf"


@pytest.mark.parametrize("conf", [None, b"", b"timeout 3\n", b"default nothing-*\n", b"default @saved\n"])
def test_without_a_default_the_first_is_taken(path: Path, conf: bytes | None) -> None:
    files = {**usual_files(), "loader/entries/zzz.conf": snippet()}
    files |= {"loader/loader.conf": conf} if conf is not None else {}
    if conf is None:
        del files["loader/loader.conf"]
    path.write_bytes(disk(files))
    with open_image(path) as image:
        assert image.default.id == "zzz.conf"


def test_an_entry_that_cannot_be_booted_is_no_default(path: Path) -> None:
    files = {
        "loader/loader.conf": b"default win*\n",
        "loader/entries/windows.conf": b"title Windows\nefi /EFI/Microsoft/boot.efi\n",
        "EFI/Microsoft/boot.efi": pe([(".text", b"x")]),
    }
    with opened(path, files) as image:
        assert [entry.id for entry in image.entries] == ["windows.conf", "debian-6.12.conf"]
        assert image.default.id == "debian-6.12.conf"


def test_entries_that_failed_come_last(path: Path) -> None:
    files = {
        "loader/loader.conf": b"",
        "loader/entries/debian-6.14+0-3.conf": snippet(),
        "loader/entries/debian-6.13+2-1.conf": snippet(),
    }
    with opened(path, files) as image:
        assert [(entry.id, entry.tries_left, entry.tries_done) for entry in image.entries] == [
            ("debian-6.13.conf", 2, 1),
            ("debian-6.12.conf", None, 0),
            ("debian-6.14.conf", 0, 3),
        ]
        assert image.default.id == "debian-6.13.conf"


def test_both_partitions_of_a_disk(path: Path) -> None:
    """XBOOTLDR and the ESP: one list; what an entry names is in its own partition."""
    other = {"loader/entries/debian-6.14.conf": snippet(linux="/k"), "k": b"in XBOOTLDR"}
    path.write_bytes(gpt([(ESP, esp()), (LINUX, b"x"), (XBOOTLDR, esp(other))]))
    with open_image(path) as image:
        assert [entry.source for entry in image.entries] == [
            "partition 3: /loader/entries/debian-6.14.conf",
            "partition 1: /loader/entries/debian-6.12.conf",
        ]
        with image.load() as loaded:
            assert content(loaded.kernel) == b"in XBOOTLDR"
        with image.load(image.select("debian-6.12")) as loaded:
            assert content(loaded.kernel) == KERNEL


def test_a_second_partition_that_is_not_fat_is_left_out(path: Path) -> None:
    ext4 = bytes(0x438) + b"\x53\xef" + bytes(4096)
    path.write_bytes(gpt([(ESP, esp()), (XBOOTLDR, ext4)]))
    with open_image(path) as image:
        assert image.default.id == "debian-6.12.conf"


# -- choosing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "debian-6.1",
        "debian-6.1.conf",
        "DEBIAN-6.1.CONF",
        "debian-6.1+3.conf",
        "*6.1",
        "debian-6.?",
        "d*6.1.c*",
    ],
)
def test_an_entry_by_name(path: Path, name: str) -> None:
    with opened(path, {"loader/entries/debian-6.1+3.conf": snippet()}) as image:
        assert image.select(name).id == "debian-6.1.conf"


def test_a_glob_prefers_what_boots(path: Path) -> None:
    with opened(path, {"loader/entries/debian-7.conf": snippet(architecture="aa64")}) as image:
        assert image.entries[0].id == "debian-7.conf"
        assert image.select("debian-*").id == "debian-6.12.conf"
        assert image.select() == image.default


def test_no_name_is_the_default(path: Path) -> None:
    with opened(path) as image:
        assert image.select(None) is image.default


# -- chv image entries -------------------------------------------------------------------


def test_the_table(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "loader/entries/arm.conf": snippet(architecture="aa64", title="For\x1b[31m Arm"),
        "loader/entries/bare.conf": snippet(),
    }
    opened(path, files).close()
    assert image_cli.main(["entries", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "   ID                TITLE            VERSION  KERNEL",
        "*  debian-6.12.conf  Debian           6.12     /EFI/debian/kernel-6.12",
        "   bare.conf         -                -        /EFI/debian/kernel-6.12",
        "   arm.conf          For\\x1b[31m Arm  -        /EFI/debian/kernel-6.12",
        "  cannot be booted: it is for the architecture aa64, not for x64",
    ]


def test_the_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(path, {"loader/entries/bad+0-2.conf": snippet(machine_id="0" * 32)}).close()
    assert image_cli.main(["entries", "--json", str(path)]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == {
        "id": "debian-6.12.conf",
        "title": "Debian",
        "version": "6.12",
        "linux": "/EFI/debian/kernel-6.12",
        "initrds": ["/EFI/debian/initrd-6.12"],
        "options": "root=LABEL=root ro quiet",
        "source": "partition 2: /loader/entries/debian-6.12.conf",
        "kind": "conf",
        "problem": "",
        "machine_id": "",
        "sort_key": "",
        "tries_left": None,
        "tries_done": 0,
        "bootable": True,
        "default": True,
    }
    assert (second["tries_left"], second["tries_done"], second["default"]) == (0, 2, False)


def test_a_table_without_an_entry_that_boots(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(disk({"loader/entries/a.conf": snippet(linux="/gone")}))
    assert image_cli.main(["entries", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "   a.conf  -      -        /gone",
        "  cannot be booted: its kernel /gone is missing",
    ]


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert image_cli.main([]) == 0
    assert "entries" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        image_cli.main(["entries"])
    assert ended.value.code == 2


def test_a_partition_type_is_stored_as_the_standard_says(path: Path) -> None:
    """The first three fields of a GUID are little-endian (UEFI 2.10, appendix A)."""
    data = bytearray(disk())
    assert bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b") in data
    path.write_bytes(data.replace(ESP.bytes_le, uuid.UUID(int=1).bytes_le))
    with pytest.raises(ImageError, match="broken"):
        open_image(path)


def test_a_raw_disk_that_begins_like_another_format(path: Path) -> None:
    """A guest may write there what it likes; the partition table says that it is a disk."""
    path.write_bytes(b"QFI\xfb" + disk()[4:])
    with open_image(path) as image:
        assert image.default.id == "debian-6.12.conf"


def test_what_is_prepared_from_an_image_names_the_image(path: Path) -> None:
    path.write_bytes(disk())  # its kernel is no kernel
    with pytest.raises(ImageError, match=rf"^kernel {path}: .*kernel-6\.12") as error:
        boot.prepare_image(path)
    assert "/proc/self" not in str(error.value)


def test_an_image_is_prepared_with_its_entrys_options_and_the_users(path: Path) -> None:
    with opened(path, {"EFI/debian/kernel-6.12": vmlinux()}):
        pass  # the file is written
    with boot.prepare_image(path, "debian-6.12", cmdline="single") as prepared:
        assert prepared._cmdline == b"root=LABEL=root ro quiet single"
