"""The corpus: a dump read as a stream with its comments, records checked, posts with too few votes left out."""

import pytest

from downriver.core import InputError
from downriver.domains.posts import Post, PostCorpus

POSTS = """<?xml version="1.0" encoding="utf-8"?>
<posts>
  <row Id="1" PostTypeId="1" Score="5" Title="How?" ClosedDate="2020-01-01"
       Body="&lt;p&gt;Ask &lt;code&gt;x&lt;/code&gt;&lt;/p&gt;" Tags="&lt;c++&gt;&lt;gcc&gt;"/>
  <row Id="2" PostTypeId="2" ParentId="1" Score="0" Body="&lt;p&gt;Answer&lt;/p&gt;"/>
  <row Id="3" PostTypeId="4" Score="9" Body="a wiki page"/>
</posts>"""
COMMENTS = """<comments>
  <row Id="1" PostId="2" Text="outdated"/><row Id="2" PostId="1" Text="first"/><row Id="3" PostId="1" Text="second"/>
</comments>"""


@pytest.fixture
def dump(tmp_path):
    (tmp_path / "Posts.xml").write_text(POSTS)
    (tmp_path / "Comments.xml").write_text(COMMENTS)
    return tmp_path


def test_a_dump_gives_questions_and_answers_with_their_comments(dump):
    corpus = PostCorpus.from_stackexchange_xml(dump / "Posts.xml", dump / "Comments.xml")
    question, answer = list(corpus)
    assert question == Post(
        1, "<p>Ask <code>x</code></p>", "How?", ("first", "second"), ("c++", "gcc"), score=5, closed=True
    )
    assert (answer.parent, answer.comments, answer.closed) == (1, ("outdated",), False)
    assert list(corpus.texts(min_score=1)) == ["How?\nAsk x\nfirst\nsecond"]
    assert len(list(corpus.texts(min_score=0))) == 2
    assert list(corpus) == [question, answer]  # a second pass


def test_old_tags_of_both_spellings(dump):
    (dump / "Posts.xml").write_text('<posts><row Id="1" PostTypeId="1" Body="b" Tags="|python|numpy|"/></posts>')
    assert next(iter(PostCorpus.from_stackexchange_xml(dump / "Posts.xml"))).tags == ("python", "numpy")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<posts><row Id='1' PostTypeId='1' Body='x'", "line 1: broken XML"),
        ("<posts><row Id='7' PostTypeId='1'/></posts>", "row 7: 'Body'"),
        ("<posts><row Id='x' PostTypeId='2' Body='b'/></posts>", "row x"),
    ],
)
def test_a_damaged_dump_is_named(dump, text, said):
    (dump / "Posts.xml").write_text(text)
    with pytest.raises(InputError, match=said):
        list(PostCorpus.from_stackexchange_xml(dump / "Posts.xml"))


def test_records_are_checked():
    with pytest.raises(InputError, match="no file"):
        PostCorpus.from_stackexchange_xml("nowhere.xml")
    with pytest.raises(InputError, match="record 1: the field 'body' is missing"):
        PostCorpus.from_records([{"id": 1, "body": "x"}, {"id": 2}])
    with pytest.raises(InputError, match="no field 'votes'"):
        PostCorpus.from_records([{"id": 1, "body": "x", "votes": 3}])
    with pytest.raises(InputError, match="body is None"):
        PostCorpus.from_records([{"id": 1, "body": None}])
