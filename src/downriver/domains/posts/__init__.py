"""Posts of technical question-and-answer sites: a corpus from a dump, an encoder of its own, and tasks on posts."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.domains.posts.corpus import Post as Post
    from downriver.domains.posts.corpus import PostCorpus as PostCorpus
    from downriver.domains.posts.entities import entity_f1 as entity_f1
    from downriver.domains.posts.entities import read_columns as read_columns
    from downriver.domains.posts.markup import render as render
    from downriver.domains.posts.sobert import sobert as sobert
    from downriver.domains.posts.sobert import train_tokenizer as train_tokenizer
    from downriver.domains.posts.system import PostSystem as PostSystem

_HERE = "downriver.domains.posts"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Post": f"{_HERE}.corpus:Post",
        "PostCorpus": f"{_HERE}.corpus:PostCorpus",
        "PostSystem": f"{_HERE}.system:PostSystem",
        "entity_f1": f"{_HERE}.entities:entity_f1",
        "read_columns": f"{_HERE}.entities:read_columns",
        "render": f"{_HERE}.markup:render",
        "sobert": f"{_HERE}.sobert:sobert",
        "train_tokenizer": f"{_HERE}.sobert:train_tokenizer",
    },
)
