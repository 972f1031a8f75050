"""The chat page as a file: its policy allows its own style and script and nothing else. `tests/e2e` opens it."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "configs" / "chat" / "chat.html").read_text(encoding="utf-8")
(POLICY,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', PAGE)


@pytest.mark.parametrize("tag", ["style", "script"])
def test_the_policy_allows_the_pages_own_parts_by_their_hash(tag: str) -> None:
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert f"{tag}-src 'sha256-{digest}';" in POLICY, f"write sha256-{digest} into the policy of {tag}s"


def test_nothing_comes_from_elsewhere_and_no_text_becomes_html() -> None:
    assert "default-src 'none'" in POLICY and "connect-src 'self'" in POLICY and "unsafe" not in POLICY
    assert not re.search(r"https?://|<link (?!rel=\"icon\" href=\"data:,\")|\bsrc=|@import|url\(", PAGE)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(|\son\w+=", PAGE)
    assert not re.search(r"localStorage|sessionStorage|indexedDB|document\.cookie", PAGE), "a key must not stay"


def test_it_fits_into_haproxys_buffer() -> None:
    config = (ROOT / "configs" / "haproxy" / "haproxy.cfg").read_text(encoding="utf-8")
    (size,) = re.findall(r"tune.bufsize (\d+)", config)
    assert len(PAGE.encode()) < int(size) / 2
