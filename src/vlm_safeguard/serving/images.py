"""A request's images: within bounds, from the request itself or from hosts that are allowed."""

from __future__ import annotations

import base64
import binascii
import io
import re
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vlm_safeguard.serving.errors import ApiError
from vlm_safeguard.serving.settings import ServeSettings

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # few readers, each a way in
_DATA = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_TRANSLATED = ip_network("64:ff9b::/96")  # addresses of IPv4 within IPv6 (RFC 6052)
_PIECE = 2**16

Address = IPv4Address | IPv6Address


def resolve(host: str) -> list[str]:
    """The addresses of a host, as the system gives them.

    Raises:
        OSError: it has none.
    """
    infos = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in infos]


def connect(address: str, host: str, timeout: float) -> socket.socket:
    """A TLS connection to this very address, whose certificate has to be the host's.

    Raises:
        OSError: there is none.
    """
    plain = socket.create_connection((address, 443), timeout)
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


@dataclass(frozen=True)
class ImageReader:
    """Reads images by their addresses; blocks while it fetches one.

    Attributes:
        resolve: gives a host's addresses.
        connect: opens a TLS connection to an address, for a host.
    """

    settings: ServeSettings
    resolve: Callable[[str], list[str]] = resolve
    connect: Callable[[str, str, float], socket.socket] = connect

    def read_all(self, urls: list[str]) -> list[Image]:
        """RGB images, in order.

        Raises:
            ApiError: too many, or one cannot be read.
        """
        if len(urls) > self.settings.max_images:
            raise _wrong(f"a request may hold {self.settings.max_images} images", "too_many_images")
        return [self._decoded(self._bytes(url)) for url in urls]

    def _bytes(self, url: str) -> bytes:
        if url[:5].lower() == "data:":
            return self._from_data(url)
        if url[:8].lower() == "https://" and self.settings.allow_image_hosts:
            return self._fetched(url)
        raise _wrong(
            "an image comes as 'data:image/png;base64,…'"
            + (" or by https from a host that is allowed" * bool(self.settings.allow_image_hosts)),
            "image_url_not_allowed",
        )

    def _from_data(self, url: str) -> bytes:
        begin = _DATA.match(url)
        if begin is None:
            raise _wrong("an image's data begin with 'data:image/png;base64,' or the like")
        encoded = url[begin.end() :]
        if len(encoded) * 3 // 4 > self.settings.max_image_bytes + 2:
            raise self._too_large()
        try:
            return base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise _wrong("an image's data are not base64") from None

    def _decoded(self, data: bytes) -> Image:
        from PIL import Image, ImageOps

        if len(data) > self.settings.max_image_bytes:
            raise self._too_large()
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > self.settings.max_image_pixels:
                    raise _wrong(
                        f"an image may have {self.settings.max_image_pixels} pixels, and one has "
                        f"{width} × {height}",
                        "image_too_large",
                    )
                return ImageOps.exif_transpose(image).convert("RGB")
        except ApiError:
            raise
        except Exception:  # decoders of many formats, which may raise all
            raise _wrong(f"an image cannot be read as {', '.join(FORMATS)}") from None

    def _too_large(self) -> ApiError:
        return _wrong(f"an image may have {self.settings.max_image_bytes} bytes", "image_too_large")

    # --- by https ---

    def _fetched(self, url: str) -> bytes:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise _wrong("an image's address cannot be read") from None
        if host not in self.settings.allow_image_hosts:
            raise _wrong("an image's host is not one that is allowed", "image_url_not_allowed")
        if parts.username is not None or parts.password is not None or port not in (None, 443):
            raise _wrong("an image's address may hold no user and no port", "image_url_not_allowed")
        address = self._public_address(host)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not target.isascii() or not target.isprintable() or " " in target:
            raise _wrong("an image's address cannot be read")
        try:
            with self.connect(address, host, self.settings.fetch_timeout) as stream:
                return self._download(stream, host, target)
        except (OSError, ValueError, HTTPException):  # ValueError: it was shut while it was read
            raise _wrong("an image could not be fetched", "image_not_fetched") from None

    def _public_address(self, host: str) -> str:
        """One of a host's addresses, all of which have to be public."""
        try:
            addresses = self.resolve(host)
        except OSError:
            addresses = []
        if not addresses:
            raise _wrong("an image's host has no address", "image_not_fetched")
        if not all(is_public(address) for address in addresses):
            raise _wrong("an image's host is in a private network", "image_url_not_allowed")
        return addresses[0]

    def _download(self, stream: socket.socket, host: str, target: str) -> bytes:
        """What a GET gives; redirects are not followed."""
        over = threading.Timer(self.settings.fetch_timeout, _shut, [stream])
        connection = HTTPConnection(host)
        connection.sock = stream
        over.start()
        try:
            connection.request("GET", target, headers={"Accept": "image/*", "Connection": "close"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise _wrong(
                    f"an image's host answered {answer.status}; redirects are not followed",
                    "image_not_fetched",
                )
            data = answer.read(self.settings.max_image_bytes + 1)
        finally:
            over.cancel()
            connection.close()
        if answer.length:  # less came than was announced: it is too large, or was cut off
            raise self._too_large() if len(data) > self.settings.max_image_bytes else _cut_off()
        return data


def is_public(address: str) -> bool:
    """Whether an address is of the public network, also where it holds one of IPv4."""
    try:
        ip: Address = ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        if ip in _TRANSLATED:
            return is_public(str(IPv4Address(int(ip) & 0xFFFFFFFF)))
        within = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if within:
            return is_public(str(within))
    return ip.is_global and not ip.is_multicast


def _shut(stream: socket.socket) -> None:
    """End a connection that another thread reads."""
    with suppress(OSError):
        stream.shutdown(socket.SHUT_RDWR)


def _wrong(message: str, code: str = "invalid_image") -> ApiError:
    return ApiError(f"{message[0].upper()}{message[1:]}.", param="messages", code=code)


def _cut_off() -> ApiError:
    return _wrong("an image could not be fetched", "image_not_fetched")
