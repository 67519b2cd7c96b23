"""Lint scorers: pycodestyle's own counts, personal data by its form, words of a lexicon."""

import io
from contextlib import redirect_stdout
from pathlib import Path

import pycodestyle
import pytest

from downriver.core.errors import InputError
from downriver.data.score import LexiconScorer, PycodestyleScorer, RegexPIIScorer

CODE = [
    "import os\n\n\ndef f(a):\n    return a\n",
    "import os,sys\ndef f( a ):\n  return a   \nx=1",
    "class A:\n\tdef f(self): pass\n    \n" + "x = '" + "y" * 90 + "'\n",
    "def broken(:\n    '''never ends\n",
]


@pytest.mark.parametrize("code", CODE)
def test_violations_are_those_of_the_program(tmp_path: Path, code: str) -> None:
    file = tmp_path / "code.py"
    file.write_text(code)
    style = pycodestyle.StyleGuide(config_file=False, parse_argv=False)
    with redirect_stdout(io.StringIO()):
        wanted = style.check_files([str(file)]).get_count()
    assert PycodestyleScorer().score([code])[0] == wanted / len(code)
    assert (wanted == 0) == (code == CODE[0])


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("ann.b+c@mail.example.org wrote", ["email"]),
        ("call (555) 123-4567 or +44 20 7946 0958", ["phone", "phone"]),
        ("host 192.168.0.1, version 1.2.3.4.5, 300.1.1.1", ["ip"]),
        ("SSN 078-05-1120, not 000-05-1120", ["ssn"]),
        ("card 4111-1111-1111-1111, not 4111 1111 1111 1112", ["card"]),
        ("pay to DE89 3704 0044 0532 0130 00", ["iban"]),
        ("password: hunter2", ["credential"]),
        ("the year 1999-2001 and 3.14159 and 10:30", []),
    ],
)
def test_personal_data_is_known_by_its_form(text: str, kinds: list[str]) -> None:
    scorer = RegexPIIScorer()
    assert [kind for kind, _ in scorer.find(text)] == kinds
    assert scorer.score([text])[0] == len(kinds) / len(text)


def test_kinds_can_be_chosen() -> None:
    scorer = RegexPIIScorer(["email"])
    assert scorer.find("a@b.org 10.0.0.1") == [("email", "a@b.org")]
    assert scorer.fingerprint != RegexPIIScorer().fingerprint
    with pytest.raises(InputError, match="unknown kind of personal data 'mail'"):
        RegexPIIScorer(["mail"])


def test_lexicon_shares() -> None:
    scorer = LexiconScorer(["Bad", "ill-bred"])
    assert scorer.score(["bad BAD good ill-bred", "badly", "..."]).tolist() == [0.75, 0.0, 0.0]
    assert LexiconScorer(["ill-bred", "bad"]).fingerprint == scorer.fingerprint
    for words, why in (([], "is empty"), (["two words"], "holds 'two words': single words")):
        with pytest.raises(InputError, match=why):
            LexiconScorer(words)


@pytest.mark.parametrize("scorer", [PycodestyleScorer(), RegexPIIScorer(), LexiconScorer(["x"])])
def test_empty_text_is_named(scorer) -> None:
    with pytest.raises(InputError, match=f"scorer '{scorer.name}', document 'd7': its text is empty"):
        scorer.score([{"text": "", "id": "d7"}])
