"""E-mails of the SpamAssassin corpus as plain text: subject and readable body, nothing of the other headers.

The headers are left out because a filter's own marks stand there.
"""

import email
import email.policy
import html
import re
from email.message import Message
from pathlib import Path

_TAG = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.S | re.I)
_SPACE = re.compile(r"[ \t\r\f\v]+")


def read(folder: Path) -> list[tuple[str, bool]]:
    """Every mail of the asset's folder as (text, is it spam), in the order of the files' names.

    The package holds each mail twice, as ``.txt`` and as ``.json``: only the former is read.
    """
    mails = []
    for path in sorted(folder.glob("*/*.txt")):
        mails.append((plain(path.read_bytes()), path.parent.name.startswith("spam")))
    return mails


def plain(raw: bytes) -> str:
    """Subject and body of one mail: its plain text, or its HTML without the tags.

    >>> plain(b"Subject: Hello\\nX-Spam-Status: No\\nContent-Type: text/html\\n\\n<p>See <b>you</b></p>")
    'Hello\\n\\nSee you'
    """
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    texts = {
        kind: [_body(p) for p in message.walk() if p.get_content_type() == kind] for kind in ("text/plain", "text/html")
    }
    body = "\n".join(texts["text/plain"]) or html.unescape(_TAG.sub(" ", "\n".join(texts["text/html"])))
    lines = (line.strip() for line in _SPACE.sub(" ", f"{message.get('Subject', '')}\n\n{body}").split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip().replace("\0", "")


def _body(part: Message) -> str:
    payload = part.get_payload(decode=True)
    return payload.decode("utf-8", "replace") if isinstance(payload, bytes) else ""
