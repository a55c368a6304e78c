"""Bytes that are no accepted image -> what they are, in words, and what to do about it.

For messages alone: nothing is decoded by what is found here. Knows nothing of TorchServe, HTTP or the network.
"""

import re

SNIFFED_BYTES = 4096  # of the start: what follows says nothing more

_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}={0,2}\s*")
_NUMBERS = re.compile(rb"[-+0-9.eE,;\s]+")
_BY_START: tuple[tuple[bytes, str], ...] = (
    (b"data:", 'a data URL as text: send it as JSON {"data": "data:..."}, or the image\'s bytes themselves'),
    (b"--", "a multipart body whose Content-Type lost its boundary: let the client set that header by itself"),
    (b"\x1f\x8b", "gzip: say so with 'Content-Encoding: gzip', or send the image itself"),
    (b"PK\x03\x04", "a zip archive, such as an .npz: send each array as .npy"),
    (b"\x80\x02", "a Python pickle, which is never read: send an .npy"),
    (b"\x80\x03", "a Python pickle, which is never read: send an .npy"),
    (b"\x80\x04", "a Python pickle, which is never read: send an .npy"),
    (b"\x80\x05", "a Python pickle, which is never read: send an .npy"),
    (b"%PDF", "a PDF: send its page as a PNG"),
    (b"\0\0\x08\x01", "an idx file of labels: send an image of the idx file of images"),
    (b"\0\0\x08\x03", "an idx file of images: send each as .npy or PNG"),
    (b"\x89HDF", "an HDF5 file: send an .npy or an image"),
    (b"8BPS", "a Photoshop file: send a PNG"),
    (b"\0\0\x01\0", "an icon: send a PNG"),
    (b"II*\0", "a TIFF whose pixels are laid out as none that is read: send a PNG"),
    (b"MM\0*", "a TIFF whose pixels are laid out as none that is read: send a PNG"),
)
_BY_BRAND = {
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"mif1": "HEIC",
    b"msf1": "HEIC",
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"qt  ": "a film",
}


def describe_bytes(content: bytes) -> str:
    """Say what bytes are that are no image of an accepted format.

    Returns:
        words that complete "got N bytes of ..." or, where nothing is known of them, "something else".
    """
    start = content[:SNIFFED_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    for prefix, words in _BY_START:
        if content.startswith(prefix) or start.startswith(prefix):
            return words
    if content[4:8] == b"ftyp":
        return f"{_BY_BRAND.get(content[8:12].lower(), 'a film or HEIC')}: send a JPEG or PNG"
    if re.match(rb"P[1-7]\s", content):
        return "a PBM, PGM or PPM: send a PNG"
    lower = start[:512].lower()
    if lower.startswith((b"<svg", b"<?xml")) and b"<svg" in start.lower():
        return "an SVG: send it drawn, as a PNG"
    if lower.startswith((b"<!doctype html", b"<html")):
        return "an HTML page: send the image that it shows"
    if lower.startswith((b"{", b"[")):
        return "JSON: send it with 'Content-Type: application/json'"
    if start and _NUMBERS.fullmatch(start):
        return 'numbers as text, such as CSV: send them as JSON {"data": [[...]]} or as .npy'
    if start and _BASE64.fullmatch(b"".join(start.split())[: SNIFFED_BYTES - SNIFFED_BYTES % 4]):
        return 'base64: send it as JSON {"data": "..."}, or the image\'s bytes themselves'
    if len(content) in (784, 784 * 4, 784 * 8):
        return "what may be bare pixels: send them as .npy, which says their shape and type"
    return "something else"
