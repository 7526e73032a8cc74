"""log.jsonl survives crashes and odd numbers."""

import json

from fastattn.train.log import RunLog, read_log


def test_records_are_on_disk_at_once_and_strict_json(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, resume_step=None)
    log.add("train", 1, loss=float("nan"), lr=0.5, note=None)
    log.add("eval", 2, loss=float("-inf"))
    lines = path.read_text().splitlines()
    assert [json.loads(line, parse_constant=lambda name: 1 / 0)["loss"] for line in lines] == ["nan", "-inf"]
    assert len(log.records) == 2


def test_a_fresh_run_starts_an_empty_log_and_a_resumed_one_drops_later_steps(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, resume_step=None)
    for step in range(1, 6):
        log.add("train", step, loss=1.0)
    log.add("end", 3, stopped="")
    assert [r["step"] for r in RunLog(path, resume_step=3).records] == [1, 2, 3]
    assert [r["step"] for r in read_log(path)] == [1, 2, 3]
    assert RunLog(path, resume_step=None).records == read_log(path) == []


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "train", "step": 1}\n{"event": "tra')
    assert read_log(path) == [{"event": "train", "step": 1}]
