from typing import Literal

import pytest

import downriver
from downriver.core import InputError
from downriver.core.registry import check_parameters, methods, resolve


def method(model, *, rank: int = 8, mode: Literal["a", "b"] = "a", needed: float): ...


def test_parameters_are_converted_and_checked():
    assert check_parameters(method, {"rank": "4", "needed": 1}, "m") == {"rank": 4, "needed": 1.0}
    with pytest.raises(InputError, match="parameter 'rank' of m is 'many'"):
        check_parameters(method, {"rank": "many", "needed": 1}, "m")
    with pytest.raises(InputError, match="parameter 'mode' of m is 'c'"):
        check_parameters(method, {"mode": "c", "needed": 1}, "m")
    with pytest.raises(InputError, match="did you mean 'rank'"):
        check_parameters(method, {"rnk": 4, "needed": 1}, "m")
    with pytest.raises(InputError, match="m needs the parameter 'needed'"):
        check_parameters(method, {}, "m")
    with pytest.raises(InputError, match="unknown parameter of m 'model'"):
        check_parameters(method, {"model": 1, "needed": 1}, "m")


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'ties'"):
        resolve("merge", "tie")


def test_a_room_that_does_not_exist_offers_nothing():
    assert methods("no_such_room") == {}


def test_a_room_that_breaks_on_import_is_not_silently_empty(tmp_path, monkeypatch):
    (tmp_path / "broken_room.py").write_text("import a_module_that_is_not_there")
    monkeypatch.setattr(downriver, "__path__", [*downriver.__path__, str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        methods("broken_room")
