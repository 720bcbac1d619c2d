"""accelerate launch ... tests/launch_cpu.py script.py --flags: runs a stage script on several CPU processes.

Prints the number of processes and the engine (accelerate can fall back to another without a word), and leaves without
the interpreter's tear-down, in which DDP on gloo sometimes aborts after all the work is done. DeepSpeed and FSDP2 are
made for GPUs: what follows leads them to believe that these processes will do.
"""
import importlib
import os
import random
import sys

from accelerate import Accelerator, PartialState

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False            # else 45 s of C++ are compiled
    state = PartialState(backend="gloo")
elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
    from accelerate.utils import DistributedType
    state = PartialState(backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # what accelerate makes FSDP of
else:
    state = PartialState(cpu=True)
if state.is_main_process:
    print(f"processes: {state.num_processes}")
real = Accelerator.__init__


def told(self, *args, **kwargs):
    real(self, *args, **kwargs)
    self.print(f"engine: {self.distributed_type.value}")


Accelerator.__init__ = told


def same_rollouts(real):
    """rollout(), but what it returns depends on the prompts alone: then runs with other processes can be compared. The
    real answers, of unequal lengths, are sampled all the same."""
    def rollout(policy, tokenizer, prompts, max_response_length, how, greedy=False):
        real(policy, tokenizer, prompts, max_response_length, how, greedy)
        answers = []
        for prompt in prompts:
            rng = random.Random(f"{prompt} {greedy} {prompts[:len(answers)].count(prompt)}")
            answer = [rng.randrange(10, 200) for _ in range(rng.randrange(1, max_response_length))]
            answers.append(answer + [tokenizer.eos_token_id] * (rng.random() < 0.7))
        return answers
    return rollout


sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
script = importlib.import_module(sys.argv[0].removesuffix(".py").replace("/", "."))
if os.environ.get("SAME_ROLLOUTS") and hasattr(script, "rollout"):
    script.rollout = same_rollouts(script.rollout)
if hasattr(script, "heed_signals"):
    script.heed_signals()
script.main(script.parse_args(script.Args, sys.argv[1:]))
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
