"""Proofs: tried once, again after a shortage, and reported by name."""

import threading

import pytest

import statedict_io as sio
from statedict_io.installed import proofs
from statedict_io.installed.proofs import ProofReport, Verdict


@pytest.fixture
def made(monkeypatch):
    """made(outcomes): a proof whose trials have these outcomes, one after the other."""
    monkeypatch.setattr(proofs, "_proofs", {})

    def make(*outcomes):
        remaining = iter(outcomes)

        @proofs.proof(proofs.LOADING)
        def trial(*args):
            assert threading.current_thread() is not threading.main_thread()
            outcome = next(remaining)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        return trial

    return make


def report():
    return proofs.reports()[proofs.LOADING]


def test_nothing_has_been_tried_at_first(made):
    assert proofs.reports() == dict.fromkeys(proofs.NAMES, ProofReport("not tried yet"))
    trial = made()
    assert report() == ProofReport("not tried yet") and trial.known() is None


def test_one_that_holds_is_tried_once(made):
    trial = made(True)
    assert trial() and trial() and trial.known()
    assert report() == ProofReport("holds")


@pytest.mark.parametrize(("outcome", "said"), [(False, "otherwise"), (ValueError("what it says"), "what it says")])
def test_one_that_failed_says_why_and_stays_so(made, outcome, said):
    trial = made(outcome)
    assert not trial() and not trial() and trial().shortage is None
    assert report().status == "failed" and said in report().reason
    assert str(report()).startswith("failed: ")


@pytest.mark.parametrize("shortage", [MemoryError("none left"), RuntimeError("can't start new thread")])
def test_one_that_lacked_something_is_tried_again(made, shortage):
    trial = made(shortage, True)
    assert str(shortage) in trial().shortage
    assert report().status == "could not be tried" and str(shortage) in report().reason
    assert trial() and report() == ProofReport("holds")


def test_a_failure_is_reported_and_otherwise_the_last_trial(made):
    trial = made(True, MemoryError("none left"), True, ValueError("no"), True)
    assert trial(1)
    trial(2)
    assert report() == ProofReport("could not be tried", "MemoryError: none left")
    trial(3)
    assert report() == ProofReport("holds")  # what 2 lacked was lacking once
    trial(4)
    trial(5)
    assert report() == ProofReport("failed", "ValueError: no")
    assert trial.known(1) == Verdict(True)


def test_the_four_proofs_hold_here_and_have_their_names(tmp_path):
    import torch

    from statedict_io.dcp import structure

    sio.save({"w": torch.ones(3)}, tmp_path / "model.pt")
    sio.load(tmp_path / "model.pt")
    structure._check_reproduced()
    found = sio.backend_info().proofs
    assert list(found) == ["format", "reduction", "loading", "dcp structure"]
    tried = {name: report.status for name, report in found.items()}
    if sio.backend_info().name != "native":
        assert tried.pop("reduction") == "not tried yet"  # nothing compiled reduces
    assert set(tried.values()) == {"holds"}
