"""Mails become subject and text, whatever their form."""

import email

import pytest

from downriver.tasks.mail import plain

PARTS = b"""Subject: Two forms
Received: from somewhere
X-Spam-Status: Yes
Content-Type: multipart/alternative; boundary="cut"

--cut
Content-Type: text/plain

The plain   text.
--cut
Content-Type: text/html
Content-Transfer-Encoding: quoted-printable

<html><style>p { color: red }</style><p>The =3D html &amp; more</p></html>
--cut--
"""


def test_plain_text_is_preferred_and_headers_are_left_out():
    assert plain(PARTS) == "Two forms\n\nThe plain text."


def test_html_alone_is_read_without_its_tags():
    only = PARTS.replace(b"--cut\nContent-Type: text/plain\n\nThe plain   text.\n", b"")
    assert plain(only) == "Two forms\n\nThe = html & more"


def test_broken_mail_gives_what_there_is():
    assert plain(b"\xff no header at all") == "\ufffd no header at all"
    assert plain(b"Subject: s\nContent-Type: text/plain; charset=x-none\n\n\xe9\n") == "s\n\n\ufffd"


@pytest.mark.assets
def test_no_header_of_a_real_mail_is_in_its_text(asset):
    files = sorted(asset("spam-assassin").glob("*/*.txt"))
    assert len(files) == 6046  # each mail once, not also as JSON
    for file in files[::40]:
        message = email.message_from_bytes(file.read_bytes())
        text = plain(file.read_bytes())
        assert text
        for header in ("Message-Id", "Received", "Return-Path", "X-Spam-Status"):
            assert not message[header] or str(message[header]).strip() not in text
