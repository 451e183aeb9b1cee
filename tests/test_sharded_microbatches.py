import os
import pathlib
import subprocess
import sys

import pytest

from tests.sharded_clipping import moving_operations


def test_slices_of_a_sharded_batch_stay_sharded():
    # In a process of its own: the number of devices is set before JAX starts.
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "tests.sharded_clipping", "microbatches"]
    root = pathlib.Path(__file__).parents[1]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("operation", ["all-gather", "all-to-all", "collective-permute-start"])
def test_operations_that_move_samples_are_found(operation):
    text = f"""%branch.1 (x: f32[4]) -> f32[16] {{
  ROOT %a = f32[16]{{0}} all-gather(%x), dimensions={{0}}
}}

%body.1 (x: f32[4]) -> f32[16] {{
  ROOT %a = f32[16]{{0}} all-gather(%x), dimensions={{0}}
}}

ENTRY %main (x: f32[4]) -> f32[16] {{
  %sum = f32[] all-reduce(%y), to_apply=%add
  %moved = f32[16]{{0}} {operation}(%x), dimensions={{0}}
  %loop = f32[16]{{0}} while(%x), condition=%flag.1, body=%body.1
  ROOT %c = f32[16]{{0}} conditional(%i, %x, %x), branch_computations={{%kept.1, %branch.1}}
}}"""
    assert moving_operations(text) == [f"%moved = f32[16]{{0}} {operation}(%x), dimensions={{0}}"]
