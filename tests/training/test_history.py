import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import make_attack, make_classifier

from art_clat import AdversarialTrainerCLATPyTorch, Criticality, EpochRecord, History, LayerCriticality, SelectionRecord
from art_clat.utils.plots import MOST_LABELS, save


def make_history(nb_layers=20, nb_selections=4, nb_epochs=12):
    layers = [f"stage{i // 6}.block{i % 6 // 2}.conv{i % 2}" for i in range(nb_layers - 1)] + ["head"]
    history = History()
    for s in range(nb_selections):
        measured = Criticality(
            layers=tuple(
                LayerCriticality(
                    name=f"{i}.{name}" if name != "head" else name,
                    weakness=0.01 * (i + 1),
                    criticality=107.0 if name == "head" else 0.5 + (i * 7 + s) % 11 / 10 if i else math.nan,
                    nb_parameters=100 + i,
                    shape=(8, 4, 4),
                    is_head=name == "head",
                )
                for i, name in enumerate(layers)
            ),
            input_weakness=0.1,
            nb_samples=64,
        )
        best = max((x for x in measured if not x.is_head and x.criticality > 0), key=lambda x: x.criticality)
        history.selections.append(SelectionRecord(3 * s, measured, (best.name,), best.nb_parameters, 10_000, 1.5))
    for e in range(nb_epochs):
        history.epochs.append(EpochRecord(e, "clat", 1.0 / (e + 1), 0.9 / (e + 1), 0.1, 0.1, 2.0, None, 0.5))
        history.add_validation(0.8, 0.4 + 0.01 * e)
    return history


def test_json_holds_everything_and_is_read_back():
    history = make_history()
    text = history.to_json()
    content = json.loads(text)  # strict JSON: NaN would fail
    assert "NaN" not in text
    assert content["selections"][1]["measured"]["layers"][0]["criticality"] is None
    assert content["epochs"][3]["robust_accuracy"] == pytest.approx(0.43)
    again = History.from_json(text)
    assert again.epochs == history.epochs
    assert again.to_json() == text
    assert math.isnan(again.selections[0].measured[0].criticality)
    assert again.selections[2].measured[1] == history.selections[2].measured[1]


def test_json_goes_to_a_file(tmp_path):
    history = make_history()
    text = history.to_json(tmp_path / "history.json")
    assert (tmp_path / "history.json").read_text() == text + "\n"


@pytest.mark.parametrize("nb_layers", [3, 20, 200])
def test_heat_map_shows_every_layer_and_marks_the_chosen(nb_layers, tmp_path):
    history = make_history(nb_layers)
    ax = history.plot_heat_map()
    assert ax.images[0].get_array().shape == (nb_layers, 4)
    names = [layer.name for layer in history.selections[0].measured]
    shown = [*names[:-1], "head (head)"]
    marks = [tuple(xy) for xy in ax.collections[0].get_offsets().tolist()]
    assert marks == [(i, names.index(s.chosen[0])) for i, s in enumerate(history.selections)]
    ticks = ax.get_yticks()
    assert len(ticks) <= MOST_LABELS and ticks[0] == 0
    assert [label.get_text() for label in ax.get_yticklabels()] == [shown[int(t)] for t in ticks]
    # labels do not overlap: each needs 8 points of the 72 in an inch
    assert ax.figure.get_size_inches()[1] * 72 / len(ticks) > 8
    save(ax, tmp_path / "heat-map.png")


def test_the_head_does_not_set_the_colour_scale():
    ax = make_history().plot_heat_map()
    assert ax.images[0].norm.vmax < 5


def test_curves_are_the_recorded_accuracies(tmp_path):
    history = make_history()
    ax = history.plot_curves()
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    assert lines["validation, robust"] == pytest.approx([100 * r.robust_accuracy for r in history.epochs])
    assert "training, clean" not in lines
    save(ax, tmp_path / "curves.svg")


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match="no selection"):
        History().plot_heat_map()
    with pytest.raises(ValueError, match="no epoch"):
        History().plot_curves()


def scored(rule, *scores):
    """A history whose selections were made by a rule with these scores."""
    history = make_history(nb_layers=3, nb_selections=len(scores))
    for number, one in enumerate(scores):
        history.selections[number] = replace(history.selections[number], rule=rule, scores=one)
    return history


def test_heat_map_is_coloured_by_the_rule_that_chose():
    history = scored("gradient_prominence", (0.1, 0.9, 40.0), (0.3, 0.2, 50.0))
    ax = history.plot_heat_map()
    (image,) = ax.get_images()
    assert image.get_array().tolist() == [[0.1, 0.3], [0.9, 0.2], [0.9, 0.9]]  # the head's scores are cut
    assert "gradient_prominence" in ax.figure.axes[1].get_ylabel()


@pytest.mark.parametrize(
    ("rule", "label"), [("relative_criticality", "relative"), ("criticality_rms", "root mean square")]
)
def test_heat_map_of_an_index_is_centred_on_one(rule, label):
    ax = scored(rule, (0.5, 2.0, 1.0)).plot_heat_map()
    (image,) = ax.get_images()
    assert image.norm.vmin * image.norm.vmax == pytest.approx(1) and image.norm.vmax == pytest.approx(2)
    assert label in ax.figure.axes[1].get_ylabel()


@pytest.mark.parametrize("scores", [(), (math.inf,) * 3])
def test_heat_map_without_scores_shows_the_criticality_index(scores):
    history = scored("all", scores)
    ax = history.plot_heat_map()
    (image,) = ax.get_images()
    index = [layer.criticality for layer in history.selections[0].measured]
    assert image.get_array()[1, 0] == pytest.approx(index[1]) and "C_i" in ax.figure.axes[1].get_ylabel()


def test_scores_that_are_not_finite_are_read_back():
    history = scored("all", (math.inf, math.nan, -math.inf))
    again = History.from_json(history.to_json()).selections[0]
    assert again.rule == "all" and (again.scores[0], again.scores[2]) == (math.inf, -math.inf)
    assert math.isnan(again.scores[1])


def test_records_of_older_versions_are_read():
    content = json.loads(make_history().to_json())
    del content["configuration"]
    for selection in content["selections"]:
        del selection["rule"], selection["scores"]
    history = History.from_json(json.dumps(content))
    assert history.configuration == {} and history.selections[0].rule == "criticality"
    history.plot_heat_map()


def test_the_record_says_what_was_run(chain, data):
    classifier = make_classifier(chain)
    trainer = AdversarialTrainerCLATPyTorch(
        classifier, make_attack(classifier), selection="random", criticality_weight=0.3, seed=5
    )
    trainer.fit(*data, nb_epochs=1, batch_size=16, verbose=False)
    again = History.from_json(trainer.history.to_json()).configuration
    assert again["trainer"]["selection"]["rule"] == "random" and again["trainer"]["criticality_weight"] == 0.3
    assert again["trainer"]["seed"] == 5 and again["trainer"]["budget"]["share"] == 0.05
    assert again["fit"] == {"nb_epochs": 1, "x": [48, 2, 6, 6], "batch_size": 16, "drop_last": False}
    assert again["attack 1"]["eps"] == "0.1" and again["versions"]["torch"] == torch.__version__.split("+")[0]
    assert again["optimizer"] == "SGD" and "machine" in again and "date" in again


def test_short_reprs():
    history = make_history()
    assert repr(history) == "History(12 epochs, 4 selections, best epoch 11)"
    assert len(repr(history.selections[0])) < 160 and "trainable=" in repr(history.selections[0])
