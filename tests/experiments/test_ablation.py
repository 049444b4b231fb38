"""The ablation on digits: rows differ by one part, runs resume, figures come from the ledger."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from cbs_opt.recipe.records import Recipe
from experiments import ablation
from experiments.ablation_figure import draw
from experiments.ledger import Ledger


def test_every_change_but_stages_exchanges_one_part_of_the_whole_recipe() -> None:
    whole = ablation.whole("digits", 0.9)
    for variant in ablation.variants("digits", 0.9):
        if variant.group != "changed" or variant.stages is not None:
            continue
        names = Recipe.__dataclass_fields__
        changed = [name for name in names if getattr(variant.recipe, name) != getattr(whole, name)]
        assert len(changed) == (variant.label != "the whole recipe")


def test_what_is_built_up_ends_at_the_whole_recipe_before_exchanges() -> None:
    built = {row.label: row.recipe for row in ablation.variants("digits", 0.9) if row.group == "built"}
    assert built["+ greedy OBS in drops"] == ablation.whole("digits", 0.9)
    assert built["magnitude"].update is None


def test_labels_name_rows() -> None:
    labels = [(row.group, row.label) for row in ablation.variants("mlpnet_mnist", 0.9)]
    assert len(labels) == len(set(labels))
    assert {group for group, _ in labels} == set(ablation.GROUPS)


@pytest.fixture
def few_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ablation.SAMPLES, "digits", (80, 4))
    cheap = [row for row in ablation.variants("digits", 0.8) if row.label in ("magnitude", "4 stages")]
    monkeypatch.setattr(ablation, "variants", lambda network, sparsity: iter(cheap))


@pytest.mark.usefixtures("few_variants")
def test_the_command_writes_tables_and_a_picture_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["--network", "digits", "--sparsity", "0.8", "--out", str(tmp_path)]
    assert ablation.main(call) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "digits.md").read_text(encoding="utf-8")
    results = ablation.run("digits", [0.8], [0], ablation.GROUPS, Ledger(tmp_path / "results.jsonl"), None)
    samples = {result["label"]: result["samples"] for result in results}
    assert samples["magnitude"] == 0
    assert samples["4 stages"] > ablation.whole("digits", 0.8).samples
    assert {result["n_prune"] for result in results} == {round(0.8 * 2368)}
    ET.parse(tmp_path / "digits.svg")
    monkeypatch.setattr(ablation.Bench, "measure", lambda *_: pytest.fail("measured again"))
    assert ablation.main(call) == 0
    assert capsys.readouterr().out == text


def test_means_and_deviations_are_over_seeds() -> None:
    cells = [
        {
            "group": "built",
            "sparsity": 0.9,
            "label": "magnitude",
            "train_loss": loss,
            "accuracy": accuracy,
            "seconds": 1.0,
            "samples": 10,
        }
        for loss, accuracy in ((1.0, 80.0), (3.0, 90.0))
    ]
    frame = ablation.ablation_frame(cells)
    assert frame["train_loss"].tolist() == [2.0]
    assert frame["accuracy"].tolist() == [85.0]
    assert frame["accuracy_std"].tolist() == pytest.approx([50.0**0.5])
    assert "| magnitude | 2.0000 | 85.00 ± 7.07 | 1.0 | 10 |" in ablation.markdown(frame)
    assert [text.get_text() for text in draw(frame).axes[0].get_yticklabels()] == ["magnitude"]
