"""log.jsonl: one JSON object per line for everything measured during a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastattn.cache import write_atomically
from fastattn.models.checkpoint.swap import naming

Record = dict[str, Any]


class RunLog:
    """Appends records to a file, each on disk before the next step, and keeps them in `records`.

    Every record has "event" ("train", "eval", "sample", "warning", "diverged" or "end") and "step".

    Args:
        path: the file, or None to keep records in memory only.
        resume_step: records of later steps in the file are dropped, because a resumed run repeats them; None drops all.
        on_record: called with each new record.
    """

    def __init__(
        self, path: Path | None, *, resume_step: int | None, on_record: Callable[[Record], None] | None = None
    ) -> None:
        self.path = path
        self.on_record = on_record
        self.records: list[Record] = []
        if resume_step is not None and path is not None and path.exists():
            kept = read_log(path)
            self.records = [r for r in kept if r["step"] <= resume_step and r["event"] != "end"]
        if path is not None:
            write_atomically(path, "".join(map(_line, self.records)))

    def add(self, event: str, step: int, **values: Any) -> None:
        """Append one record."""
        record = {"event": event, "step": step, **values}
        self.records.append(record)
        if self.path is not None:
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))
        if self.on_record is not None:
            self.on_record(record)


def read_log(path: Path) -> list[Record]:
    """The records of a log file up to the first line that is not a record, such as one truncated by a crash."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("event"), str):
            break
        if not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def _line(record: Record) -> str:
    """NaN and infinity, which JSON has no number for, become strings."""
    plain = {k: str(v) if isinstance(v, float) and v - v != 0.0 else v for k, v in record.items()}
    return json.dumps(plain) + "\n"


def plain(value: Any) -> Any:
    """A value in JSON's types; NaN and infinities become text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
