import gc
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import shard_index


def test_an_index_of_several_shards_is_read(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shard_index.py", "--samples", "2500"])
    shard_index.main()
    assert capsys.readouterr().out.startswith("2500 samples, index of 1 MiB: ")
    assert gc.isenabled()
