"""The doctor finds out what is wrong with a machine, and never fails over it."""

from __future__ import annotations

import pytest

from qswitch import doctor


@pytest.mark.parametrize("endpoint", ["hf-mirror.com", "", "https://[broken"])
def test_an_address_of_the_hub_that_is_none_is_a_finding(monkeypatch: pytest.MonkeyPatch, endpoint: str):
    monkeypatch.setattr(doctor, "forbidden_by", lambda: None)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert f"HF_ENDPOINT={endpoint} is no address. Write it with its scheme" in doctor._try_hub()
