import base64
from pathlib import Path

import pytest

from grit_client.errors import InvalidInput
from grit_client.images import data_url
from tests.api.conftest import png


def test_paths_bytes_and_data_urls_become_the_same_url(tmp_path: Path) -> None:
    path = tmp_path / "misnamed.jpg"
    path.write_bytes(png())
    url = data_url(path)
    assert url == data_url(str(path)) == data_url(png()) == data_url(url)
    assert data_url(f"DATA{url[4:]}") == f"DATA{url[4:]}"
    assert url == "data:image/png;base64," + base64.b64encode(png()).decode()


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(InvalidInput, match=r"notes\.png"):
        data_url(tmp_path / "notes.png")
    (tmp_path / "photo.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(InvalidInput, match=r"photo\.jpg cannot be sent.*HEIC.*convert it to PNG"):
        data_url(tmp_path / "photo.jpg")
    with pytest.raises(InvalidInput, match="cannot be read"):
        data_url(tmp_path / "missing.png")
    with pytest.raises(InvalidInput, match="cannot be read"):
        data_url(tmp_path)
