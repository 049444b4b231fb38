"""What the first screen shows works as shown, and what it claims is what was measured."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

import cbs_opt

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NUMBER = re.compile(r"\d+(?:\.\d+)?")
LONGEST = 120


def test_it_stays_short_and_begins_with_a_picture() -> None:
    lines = README.splitlines()
    assert len(lines) <= LONGEST
    assert any("accuracy_light.svg" in line for line in lines[:10])


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'(?:src|srcset)="([^"]+)"', README)
    assert links
    for link in links:
        path = link.partition("#")[0]
        # The reference of the command line is made when the site is built; its page is there.
        assert (ROOT / path).is_file(), link


def test_the_snippet_prints_what_stands_beneath_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    (shown,) = re.findall(r"^```text\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    Path("snippet.py").write_text(snippet)
    runpy.run_path("snippet.py")
    printed = capsys.readouterr().out
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    # The last line has times, which are those of a machine; accuracies depend on it by a few images.
    for line, expected in list(zip(printed.splitlines(), shown.splitlines(), strict=True))[:-1]:
        values, wanted = ([float(number) for number in NUMBER.findall(text)] for text in (line, expected))
        assert values == pytest.approx(wanted, rel=0.1)


def test_the_claims_on_accuracy_are_those_of_the_table() -> None:
    table = pd.read_csv(ROOT / "docs/results/accuracy.csv")
    (claim,) = re.findall(r"\*\*Accuracy\.\*\*(.*?)\n-", README, flags=re.DOTALL)
    claimed = [float(number) for number in re.findall(r"\d\d\.\d\d", claim)]

    def best(network: str, sparsity: float, *methods: str) -> float:
        rows = table[(table.network == network) & (table.sparsity == sparsity) & (table.statistics != "kept")]
        return round(float(rows.accuracy[rows.method.isin(methods)].max()), 2)

    one_stage = ("magnitude", "woodfisher", "cbs", "chita")
    expected = []
    for network, sparsity, ours, published in (
        ("mlpnet_mnist", 0.98, "fast", one_stage),
        ("resnet20_cifar10", 0.9, "fast", one_stage),
        ("mlpnet_mnist", 0.98, "best", ("chita_staged",)),
        ("resnet20_cifar10", 0.9, "best", ("chita_staged",)),
    ):
        expected += [best(network, sparsity, ours), best(network, sparsity, *published)]
    assert claimed == expected


def test_every_public_name_that_it_uses_exists() -> None:
    used = set(re.findall(r"\bcbs\.(\w+)", README))
    assert used
    assert used <= set(cbs_opt.__all__)
