import subprocess
import sys

from urae.features.claims import Claims

HOLD = """
import sys, time
from pathlib import Path
from urae.features.claims import Claims
with Claims(Path(sys.argv[1])) as claims, claims.claim("one", wait=True) as granted:
    print(granted, flush=True)
    time.sleep(60)
"""


def test_a_claim_excludes_other_processes_until_its_owner_dies(tmp_path):
    path = tmp_path / ".urae" / "lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with (
        Claims(path) as claims,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other,
    ):
        assert other.stdout.readline() == "True\n"
        with claims.claim("one", wait=False) as granted:
            assert not granted
        with claims.claim("two", wait=False) as granted:
            assert granted

        done = []
        for number in claims.share(["one", "two"], done.append):
            if number == 1:  # the free one comes first; then its owner is waited for
                other.kill()
        assert done == [0, 1, 2]
    assert list(path.parent.iterdir()) == [path]
