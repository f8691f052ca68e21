"""Images that are named by an address: fetched here, so that the service fetches nothing."""

import time
from typing import Final

import httpx

from grit_client.errors import InvalidInput, describe_network_error

SILENCE_SECONDS: Final = 15.0
"""Longest silence of a server."""
TOTAL_SECONDS: Final = 60.0
"""Longest download, from the first request to the last byte."""
MAX_REDIRECTS: Final = 5


def download(url: str, *, max_bytes: int, transport: httpx.BaseTransport | None = None) -> bytes:
    """Fetch an image, and no more of it than may be sent.

    Args:
        url: An `http://` or `https://` address; redirects are followed.
        max_bytes: A larger image is refused as soon as it is seen to be larger.
        transport: Another httpx transport, for tests and for proxies.

    Raises:
        InvalidInput: If it does not come, or is too large.
    """
    refused = f"The image {url!r} cannot be downloaded:"
    deadline = time.monotonic() + TOTAL_SECONDS
    content = bytearray()
    try:
        with (
            httpx.Client(
                transport=transport,
                timeout=SILENCE_SECONDS,
                follow_redirects=True,
                max_redirects=MAX_REDIRECTS,
                headers={"Accept": "image/png, image/jpeg, image/webp", "User-Agent": "grit"},
            ) as http,
            http.stream("GET", url) as response,
        ):
            if response.is_error:
                answer = f"{response.status_code} {response.reason_phrase}"
                raise InvalidInput(f"{refused} the server answered {answer}.")
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > max_bytes:
                    raise InvalidInput(
                        f"{refused} it has more than {max_bytes:,} bytes; make it smaller."
                    )
                if time.monotonic() > deadline:
                    raise InvalidInput(f"{refused} it takes longer than {TOTAL_SECONDS:g} s.")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        if "WRONG_VERSION_NUMBER" in str(error):
            plain = f"http://{url.partition('://')[2]}"
            raise InvalidInput(f"{refused} the server does not speak TLS. Is it {plain}?") from None
        raise InvalidInput(f"{refused} {describe_network_error(error)}.") from None
    return bytes(content)
