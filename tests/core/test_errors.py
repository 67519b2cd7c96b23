import pytest

from downriver.core import InputError, MissingExtra, require, unknown


def test_unknown_names_the_nearest_and_the_known():
    error = unknown("metric", "acuracy", ["accuracy", "loss"])
    assert isinstance(error, InputError)
    assert isinstance(error, ValueError)
    assert "did you mean 'accuracy'?" in str(error)
    assert "accuracy, loss" in str(error)


def test_unknown_without_a_near_name_does_not_guess():
    assert "did you mean" not in str(unknown("metric", "zzzzzz", ["accuracy"]))


def test_a_missing_extra_is_the_command_that_installs_it():
    with pytest.raises(MissingExtra, match=r"pip install 'downriver\[ray\]'"):
        require("a_module_that_is_not_there", "ray")
