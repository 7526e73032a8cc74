"""Run by test_distributed_tasks.py, alone or as one of several gloo processes: every task from the command line."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist
from typer.testing import CliRunner

from fastattn import cli


def main(folder, world):
    if world > 1:
        dist.init_process_group(
            "gloo"
        )  # by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; once for all tasks
    found = {}
    for name, words in json.loads((folder / "commands.json").read_text()).items():
        out = folder / f"{name}-{world}"
        size = f"--train.batch_size={4 // world}"
        result = CliRunner().invoke(cli.app, [*words, "--out", str(out), size, "--json"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, (name, result.stderr)
        if out.joinpath("report.json").exists() and (world == 1 or dist.get_rank() == 0):
            found[name] = json.loads(result.stdout)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if found:
        (folder / f"reports-{world}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
