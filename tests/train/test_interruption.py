"""Signals are noted once, obeyed the second time, and forgotten afterwards."""

import signal

import pytest

from train.interruption import Interruption

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def obeyed():
    """Signals that were obeyed; restores what pytest does with them."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    obeyed = []
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: obeyed.append(number))
    yield obeyed
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_comes(obeyed):
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption() as interruption:
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert interruption.received is None
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_the_first_signal_is_noted(obeyed, number, exit_code):
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption() as interruption:
        signal.raise_signal(number)
        assert interruption.received is number
        assert obeyed == []
    assert interruption.exit_code == exit_code
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_is_obeyed(obeyed, first, second):
    with Interruption() as interruption:
        signal.raise_signal(first)
        signal.raise_signal(second)
        assert interruption.received is first
        assert obeyed == [second]


def test_a_second_interruption_ends_the_program():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), Interruption():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_an_error_restores_the_handlers(obeyed):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError), Interruption():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_an_interruption_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption() as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.received is None
        signal.raise_signal(signal.SIGTERM)
        assert interruption.received is signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
