"""One run at a time is at work in a folder."""

import os
import subprocess
import sys
import textwrap

import pytest

from lightning_fedsparse.locking import locked
from tests.run_folders import fit


def test_a_folder_holds_one_run_at_a_time(tmp_path):
    with locked(tmp_path):
        with pytest.raises(RuntimeError, match=f"one run at a time in {tmp_path}, found process {os.getpid()} at work"):
            fit(tmp_path)
        # nor did the attempt let go of it
        assert "found process" in in_another_process(tmp_path)
    assert in_another_process(tmp_path) == ""
    fit(tmp_path)


def in_another_process(folder):
    script = "import sys; from pathlib import Path; from lightning_fedsparse.locking import locked\nwith locked(Path(sys.argv[1])): pass"
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=False)
    return done.stderr


@pytest.mark.slow
def test_the_lock_goes_with_a_killed_process_even_if_its_children_stay(tmp_path):
    script = textwrap.dedent("""
        import os, sys, time
        from pathlib import Path
        from lightning_fedsparse.locking import locked
        with locked(Path(sys.argv[1])):
            if os.fork():
                print("locked", flush=True)
            time.sleep(30)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout.readline() == b"locked\n"
            with pytest.raises(RuntimeError, match=f"found process {process.pid} at work"), locked(tmp_path):
                pass
            process.kill()
            process.wait()
            with locked(tmp_path):
                pass
        finally:
            os.killpg(process.pid, 9)
