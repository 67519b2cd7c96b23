"""HTML to text: every character of code is kept, and its place is known."""

import pytest

from downriver.domains.posts import render

PIECES = ["x  =  1", "if a < b:\n\tpass", "<T>&amp;", "  indented", "é\u00a0y"]


@pytest.mark.parametrize("code", PIECES)
@pytest.mark.parametrize(
    "shape", ["<p>Try <code>{}</code>, please</p>", "<p>Try</p><pre><code>{}\n</code></pre><p>then</p>"]
)
def test_code_is_kept_character_by_character(code, shape):
    escaped = code.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    found = render(shape.format(escaped))
    [(start, end)] = found.code
    assert found.text[start:end] == code
    assert found.text.startswith("Try")


def test_text_outside_code_is_folded_and_blocks_are_lines():
    found = render("<h1>A  title</h1><p>one\n two</p><ul><li>a</li><li>b <b>c</b></li></ul>&lt;end&gt;")
    assert found.text == "A title\none two\na\nb c\n<end>"
    assert found.code == ()


def test_broken_html_is_read_all_the_same():
    assert render("<p>open <code>x = 1</p><p>still code").text == "open x = 1\nstill code"
    assert render("a</code></p></pre> b").text == "a\nb"
    assert render("<script>evil()</script>fine<style>p {}</style>").text == "fine"
    assert render("").text == ""


def test_spans_are_in_order_and_apart():
    found = render("<code>a</code><code>b</code> c <code>d e</code>")
    assert [found.text[s:e] for s, e in found.code] in (["ab", "d e"], ["a", "b", "d e"])
    assert all(a[1] <= b[0] for a, b in zip(found.code, found.code[1:], strict=False))
