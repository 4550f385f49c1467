"""Signals that wait until the loop looks."""

import signal
import subprocess
import sys
import threading

import pytest

from pyro_nfvi.inference.signals import DeferredSignals, deferred_signals

BOTH = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def _python_handlers():
    """Python's own, whatever the shell has left, and those of before afterwards."""
    before = {signum: signal.getsignal(signum) for signum in BOTH}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def put_back():
    return (signal.getsignal(signal.SIGINT) is signal.default_int_handler
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)


@pytest.mark.parametrize("signum", BOTH)
def test_the_first_signal_is_noted_and_raised_when_asked(signum):
    with deferred_signals(sigterm=True) as signals:
        assert signals.requested is None
        signals.raise_requested()
        signal.raise_signal(signum)
        assert signals.requested is signum
    assert put_back()
    with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else SystemExit) as caught:
        signals.raise_requested()
    assert signum == signal.SIGINT or caught.value.code == 143
    signals.raise_requested()  # once is enough


def test_a_second_ctrl_c_acts_at_once():
    with deferred_signals(sigterm=True) as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.requested is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert put_back()  # by then already
    assert put_back()


@pytest.mark.parametrize("order", [BOTH, BOTH[::-1]], ids=["int-term", "term-int"])
def test_one_of_each_is_a_request_to_terminate(order):
    with deferred_signals(sigterm=True) as signals:
        for signum in order:
            signal.raise_signal(signum)
        assert signals.requested is signal.SIGTERM
        with pytest.raises(SystemExit):
            signals.raise_requested()


def test_a_signal_after_one_that_was_answered_is_a_first_one_again():
    with deferred_signals() as signals:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signals.raise_requested()
            assert signals.requested is None
    assert put_back()


def test_a_second_sigterm_ends_the_process_at_once():
    code = """
import signal
from pyro_nfvi.inference.signals import deferred_signals
with deferred_signals(sigterm=True) as signals:
    signal.raise_signal(signal.SIGTERM)
    print("waited", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "waited\n"), done.stderr


def test_sigterm_is_left_alone_unless_asked_for():
    with deferred_signals():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with deferred_signals(sigterm=True):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert put_back()


@pytest.mark.parametrize("signum", BOTH)
def test_an_ignored_signal_stays_ignored(signum):
    signal.signal(signum, signal.SIG_IGN)
    with deferred_signals(sigterm=True) as signals:
        assert signal.getsignal(signum) is signal.SIG_IGN
        signal.raise_signal(signum)
        assert signals.requested is None
    assert signal.getsignal(signum) is signal.SIG_IGN


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_handlers_are_put_back_whatever_happens(error):
    with pytest.raises(error), deferred_signals(sigterm=True):
        raise error
    assert put_back()


@pytest.mark.parametrize("signum", BOTH)
def test_a_handler_of_the_program_hears_of_it_later_and_decides(signum):
    heard = []
    signal.signal(signum, lambda number, frame: heard.append(number))
    with deferred_signals(sigterm=True) as signals:
        signal.raise_signal(signum)
        assert heard == []
        assert signals.requested is signum
        signals.raise_requested()
        assert heard == [signum]
        signal.raise_signal(signum)
        signal.raise_signal(signum)  # at once, as without
        assert heard == [signum, signum]


def test_a_context_inside_another_is_the_same():
    with deferred_signals(sigterm=True) as outer:
        with deferred_signals() as inner:
            assert inner is outer
            signal.raise_signal(signal.SIGINT)
        assert not put_back()
        assert outer.requested is signal.SIGINT
    assert put_back()
    with deferred_signals() as later:
        assert later is not outer
        assert later.requested is None


def test_outside_the_main_thread_nothing_changes():
    found = []

    def work():
        with deferred_signals(sigterm=True) as signals:
            found.append((signals.requested, put_back(), isinstance(signals, DeferredSignals)))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, True, True)]


def test_another_thread_sees_nothing_of_what_the_main_thread_was_asked():
    found = []

    def work():
        with deferred_signals() as signals:
            found.append(signals.requested)
    with deferred_signals() as signals:
        signal.raise_signal(signal.SIGINT)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert signals.requested is signal.SIGINT
    assert found == [None]
