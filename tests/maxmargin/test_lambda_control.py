"""The controller of lambda, fed accuracies and compared with values by hand."""

import pytest

from marginclip.errors import UserError
from marginclip.maxmargin.lambda_control import LambdaController


def test_lambda_rises_at_or_above_pi_and_falls_below():
    controller = LambdaController(initial=0.1, control="agreement", factor=1.2, min_agreement=0.95, first_check=1)
    values = [controller.update(agreement) for agreement in (1.0, 0.95, 0.9499, 0.0, 0.96)]
    assert values == pytest.approx([0.12, 0.144, 0.12, 0.1, 0.12])


def test_a_fixed_lambda_stays():
    controller = LambdaController(initial=0.3, control="fixed")
    assert {controller.update(agreement) for agreement in (0.0, 0.5, 1.0)} == {0.3}


def test_the_scripts_schedule_moves_it_26_times_at_epochs_40_to_290():
    controller = LambdaController(initial=0.002, control="agreement", factor=1.2, min_agreement=0.95, first_check=4)
    moved, value = [], 0.002
    for epoch in range(10, 300, 10):
        if controller.update(1.0) != value:
            moved.append(epoch)
        value = controller.value
    assert moved == list(range(40, 300, 10))
    assert value == pytest.approx(0.002 * 1.2**26)


def test_lambda_stays_within_its_limits():
    controller = LambdaController(initial=1.0, control="agreement", factor=10, first_check=1, smallest=0.01, largest=50)
    assert [controller.update(1.0) for _ in range(3)] == [10, 50, 50]
    assert [controller.update(0.0) for _ in range(5)] == pytest.approx([5, 0.5, 0.05, 0.01, 0.01])


def test_an_interrupted_run_goes_on_as_if_it_had_not_been():
    settings = {"initial": 0.2, "control": "agreement", "first_check": 3}
    whole, first, second = (LambdaController(**settings) for _ in range(3))
    expected = [whole.update(1.0) for _ in range(6)]
    values = [first.update(1.0) for _ in range(2)]
    second.load_state_dict(first.state_dict())
    assert values + [second.update(1.0) for _ in range(4)] == expected


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"initial": -0.1}, "must not be negative, got -0.1"),
        ({"control": "auto"}, "one of fixed, agreement, got 'auto'"),
        ({"factor": 1.0}, "greater than 1, got 1"),
        ({"min_agreement": 95}, r"in \[0, 1\], got 95"),
        ({"smallest": 2.0, "largest": 1.0}, "smallest"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        LambdaController(**setting)
