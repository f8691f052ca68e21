from grit_core import errors
from grit_core.errors import Fault, GritError, InvalidConfig, NoLayersMatched


def test_an_invalid_config_says_every_fault_with_its_place() -> None:
    faults = [
        Fault(pointer="/config/text/rank", code="out_of_range", detail="rank is 0."),
        Fault(pointer="", code="missing", detail="Nothing is there."),
    ]
    error = InvalidConfig(faults)
    assert error.faults == tuple(faults)
    assert str(error) == "/config/text/rank: rank is 0.\n/: Nothing is there."


def test_every_error_hangs_in_the_tree_that_the_docstring_draws() -> None:
    assert errors.__doc__ is not None
    classes = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]
    assert all(issubclass(value, GritError) for value in classes)
    assert all(value.__name__ in errors.__doc__ for value in classes)
    assert issubclass(NoLayersMatched, ValueError)
