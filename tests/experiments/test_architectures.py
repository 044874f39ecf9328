"""The table of architectures: what is tried, and that nothing stops it."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import architectures

pytestmark = pytest.mark.slow


def test_everything_works_in_a_common_architecture():
    row = architectures.examine("LlamaForCausalLM")
    assert row == dict.fromkeys(architectures.COLUMNS, "yes")


def test_what_does_not_work_is_named_in_the_words_of_the_library():
    row = architectures.examine("MambaForCausalLM")
    assert row["residual"] == "yes"
    assert "the model shows none in any layer" in row["detection"]
    assert "full" not in row


def test_an_architecture_that_takes_too_long_does_not_stop_the_others(monkeypatch):
    monkeypatch.setattr(architectures, "LIMIT", 0.01)
    assert architectures.examine_apart("LlamaForCausalLM")["load"].startswith("no answer within")


def test_reasons_are_numbered_and_listed_once():
    yes = dict.fromkeys(architectures.COLUMNS, "yes")
    rows = [
        {"architecture": "A"} | yes,
        {"architecture": "B"} | yes | {"cached": "too odd", "packed": "too odd"},
        {"architecture": "C"} | dict.fromkeys(architectures.COLUMNS, "") | {"load": "an encoder"},
    ]
    page = architectures.page(pd.DataFrame(rows), ["D"])
    assert "| `B` | yes | yes | yes | yes | yes | (1) | (1) | yes | yes |" in page
    assert page.count("too odd") == 1
    assert "* `C` not loaded: an encoder" in page
    assert "* `D` not tried" in page
