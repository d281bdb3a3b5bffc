"""One process at a time in a folder."""

import os
import subprocess
import sys
import time

import pytest

from sinkformer_pl.errors import UserError
from sinkformer_pl.training.folder_lock import locked

CHILD = "import sys; sys.stdin.read()"


def test_a_second_holder_is_refused_until_the_first_lets_go(tmp_path):
    path = tmp_path / "lock"
    with locked(path, "taken"), pytest.raises(UserError, match="taken"), locked(path, "taken"):
        pass
    with locked(path, "taken"):
        pass


def test_a_process_that_was_given_the_descriptor_holds_on_and_a_forked_one_does_not(tmp_path):
    path = tmp_path / "lock"
    with locked(path, "taken") as descriptor:
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, pass_fds=(descriptor,))
    with pytest.raises(UserError, match="taken"), locked(path, "taken"):
        pass
    child.communicate()
    with locked(path, "taken"):
        forked = os.fork()
        if not forked:
            time.sleep(20)
            os._exit(0)
        time.sleep(0.1)  # until the fork has closed its copy
    try:
        with locked(path, "taken"):
            pass
    finally:
        os.kill(forked, 9)
        os.waitpid(forked, 0)
