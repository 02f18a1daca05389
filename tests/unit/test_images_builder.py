"""The builder of the Clear-shaped image: its layout, the disks it puts together, and the image it built."""

from __future__ import annotations

import json
import shutil
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.guests.kernels import SERIES
from tests.images import ClearImage, cloudhv, disk, find, layout, rootfs
from tests.images.build import TOOLS, make_key
from tests.support import require

RELEASES = {"6.12": "6.12.117+deb12-cloud-amd64", "6.1": "6.1.0-56-cloud-amd64"}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip unless the programs that put a disk together are here."""
    monkeypatch.setenv("PATH", PATH, prepend=":")
    for tool in ("mcopy", "mkfs.vfat", "sfdisk", "mke2fs", "fallocate"):
        require(shutil.which(tool), f"{tool} (Debian: {TOOLS[tool]})")


@pytest.fixture
def image(tools: None) -> ClearImage:
    """The image that was built."""
    try:
        return find()
    except FileNotFoundError as error:
        require(False, str(error))
        raise


def partitions(path: Path) -> list[dict[str, object]]:
    command = ["sfdisk", "--json", str(path)]
    table = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["partitiontable"]
    assert table["label"] == "gpt"
    found = table["partitions"]
    assert isinstance(found, list)
    return found


# -- the layout ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "version"),
    [("6.12.117+deb12-cloud-amd64", "6.12.117"), ("6.1.0-56-cloud-amd64", "6.1.0-56"), ("7.0", "7.0")],
)
def test_version_is_plain(release: str, version: str) -> None:
    assert layout.version(release) == version


def test_version_of_something_else() -> None:
    with pytest.raises(ValueError, match="does not begin"):
        layout.version("cloud-amd64")


@pytest.mark.parametrize("series", RELEASES)
def test_pattern_matches_its_own_series_only(series: str) -> None:
    for other, release in RELEASES.items():
        name = layout.entry_name(release)
        for spelled in (name, name.lower()):
            assert fnmatchcase(spelled, layout.pattern(series)) is (other == series)


@pytest.mark.parametrize("release", RELEASES.values())
def test_entry_fits_the_smallest_loader(release: str) -> None:
    entry = layout.entry(release)
    # rust-hypervisor-firmware reads files of up to 4096 bytes.
    assert len(entry.encode()) <= 4096
    words = dict(line.split(None, 1) for line in entry.splitlines())
    assert words["linux"] == "/" + layout.kernel_path(release)
    assert words["initrd"] == "/" + layout.initrd_path(release)
    assert f"root=LABEL={layout.ROOT_LABEL}" in words["options"]


def test_networks_are_apart() -> None:
    addresses = [layout.address(number) for number in range(layout.NETWORKS)]
    assert addresses[0] == "192.168.249.2"
    assert len({address.rpartition(".")[0] for address in addresses}) == layout.NETWORKS
    assert [rootfs.network(number).count("Gateway=") for number in range(layout.NETWORKS)] == [1, 0, 0, 0]


# -- a disk out of files -------------------------------------------------------------------


@pytest.mark.usefixtures("tools")
def test_disk(tmp_path: Path) -> None:
    path, folder = tmp_path / "disk.img", tmp_path / "root"
    kernel = bytes(range(256)) * 5000
    (folder / "etc").mkdir(parents=True)
    (folder / "etc/hostname").write_text("clear\n")
    disk.make_table(path)
    disk.make_esp(
        path, {"EFI/org.clearlinux/kernel-org.clearlinux.kvm.1.2": kernel, "loader/loader.conf": b"a\n"}
    )
    disk.make_root(path, folder, [])
    disk.make_sparse(path)

    assert [row["type"] for row in partitions(path)] == [layout.ESP_TYPE, layout.ROOT_TYPE]
    assert path.stat().st_size == layout.IMAGE_SIZE
    assert disk.allocated(path) < 16 * layout.MIB
    built = ClearImage(path, tmp_path / "key", {})
    assert built.read("EFI/org.clearlinux/kernel-org.clearlinux.kvm.1.2") == kernel
    built.write("loader/loader.conf", b"b\n")
    assert built.read("LOADER/LOADER.CONF") == b"b\n"
    check_root(path)


def check_root(path: Path) -> None:
    """e2fsck finds nothing; the label is what the boot entries name; there is no journal."""
    root = f"{path}?offset={layout.ROOT_START}"
    done = subprocess.run(["e2fsck", "-f", "-n", root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    header = subprocess.run(["dumpe2fs", "-h", root], capture_output=True, text=True, check=True).stdout
    assert f"name:   {layout.ROOT_LABEL}\n" in header
    assert "has_journal" not in header


# -- the image that was built --------------------------------------------------------------


def test_image_is_small_and_whole(image: ClearImage) -> None:
    assert disk.allocated(image.path) < 400_000_000
    assert [row["type"] for row in partitions(image.path)] == [layout.ESP_TYPE, layout.ROOT_TYPE]
    check_root(image.path)


def test_image_has_what_its_entries_name(image: ClearImage) -> None:
    assert next(iter(image.entries)) == SERIES[0]
    assert image.read(layout.BOOT_LOADER)[:2] == b"MZ"
    for name in image.entries.values():
        entry = image.read(f"loader/entries/{name}").decode()
        words = dict(line.split(None, 1) for line in entry.splitlines())
        # Linux, Documentation/arch/x86/boot.rst: the signature at 0x202.
        assert image.read(words["linux"].lstrip("/"))[0x202:0x206] == b"HdrS"
        assert image.read(words["initrd"].lstrip("/"))[:2] == b"\x1f\x8b"


def test_image_boots_its_newest_kernel(image: ClearImage) -> None:
    wanted = image.entries[SERIES[0]].removesuffix(".conf")
    assert image.read("loader/loader.conf").decode() == f"timeout 0\ndefault {wanted}\n"


def test_copy_leaves_the_image_alone(image: ClearImage, tmp_path: Path) -> None:
    before = image.path.stat()
    copied = image.copy(tmp_path, default=SERIES[0])
    after = image.path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert after.st_mode & 0o222 == 0
    assert copied.path.stat().st_size == before.st_size
    assert disk.allocated(copied.path) < 400_000_000
    assert layout.pattern(SERIES[0]) in copied.read("loader/loader.conf").decode()
    assert layout.pattern(SERIES[0]) not in image.read("loader/loader.conf").decode()
    assert copied.ssh("true") == image.ssh("true")
    # pytest would keep it for some runs.
    copied.path.unlink()


def test_copy_with_a_kernel_that_is_not_there(image: ClearImage, tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"no kernel 2\.6: 6\.12"):
        image.copy(tmp_path, default="2.6")


# -- keys and files that are missing -------------------------------------------------------


def test_key_is_made_once(tmp_path: Path) -> None:
    require(shutil.which("ssh-keygen"), f"ssh-keygen (Debian: {TOOLS['ssh-keygen']})")
    key = tmp_path / "id_ed25519"
    public = make_key(key)
    assert public.startswith("ssh-ed25519 ")
    assert key.stat().st_mode & 0o777 == 0o600
    assert make_key(key) == public


def test_nothing_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHV_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"run `python -m tests\.images`"):
        find()
    with pytest.raises(FileNotFoundError, match=r"run tools/cloudhv\.sh"):
        cloudhv()


def test_firmware_is_a_pvh_elf() -> None:
    try:
        data = cloudhv().read_bytes()
    except FileNotFoundError as error:
        require(False, str(error))
        raise
    assert len(data) == 4 * layout.MIB
    # ELF64, little-endian, ET_EXEC, and EM_386, which does not fit: the loader has to take it.
    assert data[:6] == b"\x7fELF\x02\x01"
    assert (int.from_bytes(data[16:18], "little"), int.from_bytes(data[18:20], "little")) == (2, 3)
    # The PVH note (xen/include/public/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY): type 18, 4 bytes.
    assert b"\4\0\0\0\4\0\0\0\x12\0\0\0Xen\0" in data[:4096]
