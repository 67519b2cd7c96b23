"""Posts of a question-and-answer site: read from a dump, or from records of one's own.

Reach for ``PostCorpus`` to pretrain on whole posts, a post with its code and its comments as one text, which is what
SOBert does and what sets it apart from pretraining on single sentences (Mukherjee and Hellendoorn 2023,
arXiv:2306.03268).
"""

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree

from downriver.core.errors import InputError
from downriver.domains.posts.markup import render


@dataclass(frozen=True)
class Post:
    """A question or an answer (``parent`` is then its question), with its comments; ``body`` and comments are HTML."""

    id: int
    body: str
    title: str = ""
    comments: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    score: int = 0
    closed: bool = False
    parent: int | None = None

    def text(self) -> str:
        """Title, body and comments, a line break between them; code as it stands.

        >>> Post(1, "<p>Try <code>x</code></p>", "How?", ("Thanks",)).text()
        'How?\\nTry x\\nThanks'
        """
        return "\n".join(part for part in (self.title, *(render(h).text for h in (self.body, *self.comments))) if part)


class PostCorpus:
    """Posts that can be gone through again and again without being held in memory.

    Args:
        posts: a function that starts a new pass.
        name: what errors call the corpus.

    >>> corpus = PostCorpus.from_records([{"id": 1, "body": "<p>one</p>", "score": 3}, {"id": 2, "body": "two"}])
    >>> list(corpus.texts(min_score=1))
    ['one']
    """

    def __init__(self, posts: Callable[[], Iterator[Post]], name: str = "posts") -> None:
        self._posts, self.name = posts, name

    def __iter__(self) -> Iterator[Post]:
        return self._posts()

    def texts(self, *, min_score: int = 1) -> Iterator[str]:
        """The text of every post with that score at least and something in it.

        One vote or more is taken for the paper's filter (its exact rule is not published).
        """
        for post in self:
            if post.score >= min_score and (text := post.text()):
                yield text

    @classmethod
    def from_records(cls, posts: Iterable[Post | Mapping[str, Any]], name: str = "posts") -> Self:
        """From posts, or from mappings with their fields; raises ``InputError`` naming record and field."""
        found = [post if isinstance(post, Post) else _post(post, f"{name}, record {i}") for i, post in enumerate(posts)]
        return cls(lambda: iter(found), name)

    @classmethod
    def from_stackexchange_xml(
        cls, posts: str | os.PathLike[str], comments: str | os.PathLike[str] | None = None
    ) -> Self:
        """From the ``Posts.xml`` (and ``Comments.xml``) of a public Stack Exchange dump.

        Both are read as streams; comments wait in a temporary database on disk, so that memory does not grow with the
        dump. Rows that are neither questions nor answers are passed over. Raises ``InputError`` naming the file, and
        the line where the XML is broken.
        """
        posts = Path(posts)
        comments = None if comments is None else Path(comments)
        for path in (posts, comments):
            if path is not None and not path.is_file():
                raise InputError(f"{path} is no file: an XML file of a Stack Exchange dump is expected")

        def start() -> Iterator[Post]:
            with tempfile.TemporaryDirectory() as scratch:
                said = _Comments(Path(scratch) / "comments.db", comments) if comments else None
                for row in _rows(posts):
                    if row.get("PostTypeId") in ("1", "2"):
                        yield _from_row(row, posts, said)

        return cls(start, str(posts))


class _Comments:
    """The comments of a dump by post."""

    def __init__(self, path: Path, source: Path) -> None:
        self.database = sqlite3.connect(path)
        self.database.execute("create table comment (post integer, text text)")
        rows = ((int(row["PostId"]), row.get("Text", "")) for row in _rows(source) if "PostId" in row)
        self.database.executemany("insert into comment values (?, ?)", rows)
        self.database.execute("create index of_post on comment (post)")

    def of(self, post: int) -> tuple[str, ...]:
        found = self.database.execute("select text from comment where post = ? order by rowid", (post,))
        return tuple(text for (text,) in found)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        events = ElementTree.iterparse(path, events=("start", "end"))
        _, root = next(events)
        for event, element in events:
            if event == "end" and element.tag == "row":
                yield dict(element.attrib)
                root.clear()
    except ElementTree.ParseError as error:
        raise InputError(f"{path}, line {error.position[0]}: broken XML ({error.msg})") from None


def _from_row(row: dict[str, str], path: Path, said: _Comments | None) -> Post:
    try:
        number = int(row["Id"])
        return Post(
            id=number,
            body=row["Body"],
            title=row.get("Title", ""),
            comments=said.of(number) if said else (),
            tags=tuple(tag for tag in row.get("Tags", "").replace("><", "|").strip("<>|").split("|") if tag),
            score=int(row.get("Score", 0)),
            closed="ClosedDate" in row,
            parent=int(row["ParentId"]) if "ParentId" in row else None,
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}, row {row.get('Id', '?')}: {error} where a post is expected") from None


def _post(record: Mapping[str, Any], where: str) -> Post:
    known = {field.name for field in fields(Post)}
    if strange := [name for name in record if name not in known]:
        raise InputError(f"{where}: a post has no field {strange[0]!r} (it has: {', '.join(sorted(known))})")
    if missing := [name for name in ("id", "body") if name not in record]:
        raise InputError(f"{where}: the field {missing[0]!r} is missing")
    if not isinstance(record["body"], str):
        raise InputError(f"{where}: the body is {record['body']!r}: a text is expected")
    lists = {name: tuple(record[name]) for name in ("comments", "tags") if name in record}
    return Post(**{**record, **lists})
