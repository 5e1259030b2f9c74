"""What is shown of the Hub's errors: one line, and never a token."""

import pytest

from hf_plm.remote import scrub


@pytest.mark.parametrize("token", ["hf_" + "aB3" * 10, "an-older-token-of-another-form"])
def test_no_token_is_shown(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    shown = scrub(f"refused:\n  key={token}, Authorization: Bearer {token}, and hf_somebodyelses1")
    assert token not in shown
    assert "somebodyelses" not in shown
    assert shown.startswith("refused: key=***")
