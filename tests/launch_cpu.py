"""accelerate launch ... tests/launch_cpu.py script.py --flags: runs a stage script on several CPU processes.

Prints the number of processes (accelerate can fall back to one without a word), and leaves without the interpreter's
tear-down, in which DDP on gloo sometimes aborts after all the work is done.
"""
import os
import runpy
import sys

from accelerate import PartialState

state = PartialState(cpu=True)
if state.is_main_process:
    print(f"processes: {state.num_processes}")
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
