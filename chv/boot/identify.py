"""Say what a file is that cannot be booted, so that the person sees at once what went wrong."""

from __future__ import annotations

from . import decompress

HEAD = 36 * 1024  # how much of a file describe() looks at; an ISO 9660 volume descriptor is at 32 KiB

_UNPACKERS = {
    "gzip": "gzip -d",
    "bzip2": "bzip2 -d",
    "lzma": "xz --format=lzma -d",
    "xz": "xz -d",
    "lzo": "lzop -d",
    "lz4": "lz4 -d",
    "zstd": "zstd -d",
}

# (offset, magic, what it is), the most telling first.
_MAGICS = (
    (0x38, b"ARM\x64", "is a 64-bit Arm kernel (Image)"),
    (0x24, b"\x18\x28\x6f\x01", "is a 32-bit Arm kernel (zImage)"),
    (0x38, b"RSC\x05", "is a RISC-V kernel (Image)"),
    (0x200, b"EFI PART", "is a disk image (GPT)"),
    (0x8001, b"CD001", "is a CD image (ISO 9660)"),
    (0x438, b"\x53\xef", "is a file system image (ext2, ext3 or ext4)"),
    (0, b"QFI\xfb", "is a disk image (qcow2)"),
    (0, b"vhdxfile", "is a disk image (VHDX)"),
    (0, b"conectix", "is a disk image (VHD)"),
    (0, b"KDMV", "is a disk image (VMDK)"),
    (0, b"hsqs", "is a file system image (squashfs)"),
    (0, b"070701", "is an initramfs (cpio archive)"),
    (0, b"070702", "is an initramfs (cpio archive)"),
    (0, b"!<arch>\n", "is an archive or a Debian package (ar)"),
    (0, b"\xed\xab\xee\xdb", "is an RPM package"),
    (0, b"\x27\x05\x19\x56", "is a U-Boot image"),
    (0, b"\xd0\x0d\xfe\xed", "is a flattened device tree or FIT image"),
    (0x28, b"_FVH", "is a UEFI firmware volume; its ELF form (EDK2's OvmfPkg/CloudHv) boots here"),
    (0, b"#!", "is a script"),
    (0, b"MZ", "is an EFI or Windows program (PE) without a Linux setup header"),
    (0x1FE, b"\x55\xaa", "is a disk image (boot sector)"),
)
_TEXT_SAMPLE = 512


def describe(head: bytes) -> str:
    """What a file that starts with ``head`` seems to be: a phrase for after the file's name."""
    packed = decompress.format_of(head)
    if packed == "lz4" or head[:4] == b"\x04\x22\x4d\x18":
        return "is compressed with lz4; unpack it first (lz4 -d)"
    if packed:
        return f"is compressed with {packed}; unpack it first ({_UNPACKERS[packed]})"
    for offset, magic, phrase in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return phrase
    if not head.strip(b"\0"):
        return "holds only zeros at its start"
    if _is_text(head[:_TEXT_SAMPLE]):
        return "is a text file"
    return "is of an unknown kind"


def _is_text(sample: bytes) -> bool:
    try:
        text = sample.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(sample) - 3:  # not just a character cut in two by the end of the sample
            return False
        text = sample[: error.start].decode("utf-8")
    return all(character.isprintable() or character in "\t\n\r\f" for character in text)
