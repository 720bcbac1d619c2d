"""accelerate launch ... tests/launch_cpu.py script.py --flags [-- another.py --flags ...]: scripts on several CPU processes.

Prints the number of processes and the engine (accelerate can fall back to another without a word), and leaves without
the interpreter's tear-down, in which DDP on gloo sometimes aborts after all the work is done.
"""
import importlib
import os
import random
import sys


def same_rollouts(real):
    """rollout(), but what it returns depends on the prompts alone: then runs with other processes can be compared. The
    real answers, of unequal lengths, are sampled all the same."""
    def rollout(policy, prompts, max_response_length, stop_ids, greedy=False):
        real(policy, prompts, max_response_length, stop_ids, greedy)
        answers = []
        for prompt in prompts:
            rng = random.Random(f"{prompt} {greedy} {prompts[:len(answers)].count(prompt)}")
            answer = [rng.randrange(10, 200) for _ in range(rng.randrange(1, max_response_length))]
            answers.append(answer + stop_ids[:1] * (rng.random() < 0.7))
        return answers
    return rollout


def main():
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False         # else 45 s of C++ are compiled
        state = PartialState(backend="gloo")
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state = PartialState(backend="gloo")
        PartialState._shared_state["distributed_type"] = "MULTI_GPU"           # what accelerate makes FSDP of
    else:
        state = PartialState(cpu=True)
    state.print(f"processes: {state.num_processes}")
    real = Accelerator.__init__

    def told(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.print(f"engine: {self.distributed_type.value}")

    Accelerator.__init__ = told
    PartialState.destroy_process_group = lambda self, group=None: None         # the next script needs it
    sys.path.insert(0, os.getcwd())
    words = sys.argv[1:]
    while words:
        end = words.index("--") if "--" in words else len(words)
        sys.argv, words = words[:end], words[end + 1:]
        script = importlib.import_module(sys.argv[0].removesuffix(".py").replace("/", "."))
        if os.environ.get("SAME_ROLLOUTS") and hasattr(script, "rollout"):
            script.rollout = same_rollouts(script.rollout)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and hasattr(script, "ActorCritic"):
            script.MAX_GRAD_NORM = 1000.0                      # it clips PPO's two models together, which we do apart
        script.main(script.parse_args(script.Args, sys.argv[1:]))
        AcceleratorState._reset_state()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
