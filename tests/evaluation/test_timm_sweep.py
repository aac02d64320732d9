"""`evaluation/timm_sweep.py`: one process a family, what is done is skipped, and the matrix says what does not work."""

import json
import time

import timm_sweep


def test_a_family_that_is_done_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_sweep, "try_family", lambda family, seed, path: path.write_text('{"family": "again"}'))
    assert timm_sweep.run_family("vgg", 0, tmp_path / "new.json", timeout=60) == {"family": "again"}
    path = tmp_path / "vgg.json"
    path.write_text(json.dumps({"family": "vgg", "verdict": "ok"}))
    assert timm_sweep.run_family("vgg", 0, path, timeout=60) == {"family": "vgg", "verdict": "ok"}


def test_a_family_that_takes_too_long_is_recorded_as_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_sweep, "try_family", lambda *_: time.sleep(60))
    path = tmp_path / "vgg.json"
    result = timm_sweep.run_family("vgg", 0, path, timeout=0.1)
    assert result["verdict"] == "failed" and result["reason"] == "it took over 0.1 seconds"
    assert json.loads(path.read_text()) == result and 0.1 < result["seconds"] < 30


def test_the_matrix_shows_what_works_and_names_what_does_not():
    results = [
        {"family": "good", "verdict": "ok", "reason": "", "model": "good_tiny", "models": 3, "side": 32,
         "parameters": 1_250_000, "layers": 5, "chosen": ["a", "b", "c"], "blocks": 4, "seconds": 2.4, "small": ""},
        {"family": "partly", "verdict": "ok", "reason": "", "model": "partly_tiny", "models": 1, "side": 64,
         "parameters": 90_000, "layers": 2, "chosen": ["a"], "blocks": "no\n  groups", "seconds": 1.0,
         "small": "ValueError: too small"},
        {"family": "bad", "verdict": "failed", "reason": "it ended with -9", "seconds": 0.6},
    ]  # fmt: skip
    text = timm_sweep.page(results, {"seed": 0})
    assert "2 of 3 families work." in text and "(1 families have them)" in text and "(1 families)" in text
    assert "| good | good_tiny | 1.2 M | 32 | 5 | `a`, `b` and 1 more | 4 | yes | 2 | ok |" in text
    assert "| partly | partly_tiny | 0.1 M | 64 | 2 | `a` | no | no | 1 | ok |" in text
    assert "| bad |  | 0.0 M |  |  |  | no | no | 1 | failed |" in text
    notes = ["- partly, blocks: no groups", "- partly, 32×32: ValueError: too small", "- bad: it ended with -9"]
    assert "\n\n" + "\n".join(notes) + "\n\n```json\n" in text
    assert "\n- nothing\n" in timm_sweep.page(results[:1], {}) and text.endswith('{\n  "seed": 0\n}\n```\n')
