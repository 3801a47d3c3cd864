"""The experiments: a question each, and the runs of train.py that answer it. The first arm is what
the others are compared with. All are on the tiny model unless they say otherwise."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    question: str
    arms: dict[str, str]  # name -> flags of train.py; "-m MODULE ..." runs that module in its place
    common: str = ""  # flags of all arms
    command: str = "train.py"
    at: tuple[int, ...] = (10,)  # steps of the table, beside the last one
    seeds: int = 8  # seeds 1 to this


LONG = "--steps 40 --eval-every 10 --save-every 40 --watch-layers 5"
SHORT = "--steps 20 --eval-every 10 --save-every 20 --watch-layers 0"
GRPO = "--bupo-layer none"
TRAP = "-m experiments.traps"

EXPERIMENTS = {
    "layers": Experiment(
        "Does training an internal layer first help, and is it the internal objective or only that "
        "fewer blocks learn?",
        {
            "GRPO": GRPO,
            "BuPO layer 1": "--bupo-layer 1 --bupo-steps 15",
            "BuPO layer 2": "--bupo-layer 2 --bupo-steps 15",
            "BuPO layer 3": "--bupo-layer 3 --bupo-steps 15",
            "GRPO, block 1": f"{GRPO} --train-blocks 1-1 --train-blocks-steps 15",
            "GRPO, blocks 1-2": f"{GRPO} --train-blocks 1-2 --train-blocks-steps 15",
            "GRPO, blocks 1-3": f"{GRPO} --train-blocks 1-3 --train-blocks-steps 15",
        },
        LONG,
    ),
    "length": Experiment(
        "How long should the internal phase be? Layer 3, from no step of 40 to all.",
        {
            "0 steps": GRPO,
            "5 steps": "--bupo-layer 3 --bupo-steps 5",
            "15 steps": "--bupo-layer 3 --bupo-steps 15",
            "25 steps": "--bupo-layer 3 --bupo-steps 25",
            "all 40 steps": "--bupo-layer 3 --bupo-steps 40",
            "auto": "--bupo-layer 3 --bupo-steps auto",
        },
        LONG,
    ),
    "norm": Experiment(
        "Is it the scale of a state that makes a layer's policy? A norm before its unembedding, or "
        "none.",
        {
            "no norm": "--bupo-layer 3 --bupo-steps 15",
            "rms": "--bupo-layer 3 --bupo-steps 15 --internal-norm rms",
            "final norm": "--bupo-layer 3 --bupo-steps 15 --internal-norm final",
            "GRPO": GRPO,
        },
        LONG,
    ),
    "order": Experiment(
        "Does bottom-up matter? Fifteen steps of layer 3 before, after or together with the whole.",
        {
            "bottom up: 3, then all": "--bupo-layer 3 --bupo-steps 15",
            "two phases: 2, 3, then all": "--bupo-layer 2,3 --bupo-steps 8,7",
            "top down: all, then 3": "--bupo-layer 4,3 --bupo-steps 25,15",
            "both at once, then all": "--bupo-layer 3+4 --bupo-steps 15",
            "GRPO": GRPO,
        },
        LONG,
    ),
    "reward": Experiment(
        "How much of the gain needs right answers? Rewards for a box alone, and by a coin.",
        {
            "right answers": GRPO,
            "any box": f"{GRPO} --reward format",
            "a coin": f"{GRPO} --reward random",
            "a coin, BuPO layer 3": "--bupo-layer 3 --bupo-steps 15 --reward random",
        },
        SHORT,
    ),
    "traps": Experiment(
        "What do well-known faults cost that no error message tells of?",
        {
            "GRPO as it should be": GRPO,
            "clip with the wrong sign": f"{TRAP} clip-sign {GRPO}",
            "stop token untrained": f"{TRAP} stop-token {GRPO}",
            "mean over each micro-batch": f"{TRAP} micro-mean {GRPO}",
            "bfloat16 weights": f"{GRPO} --dtype bfloat16 --optimizer adamw",
            "trainer forgets T = 0.6": f"{TRAP} temperature {GRPO} --temperature 0.6",
            "T = 0.6 as it should be": f"{GRPO} --temperature 0.6",
        },
        SHORT,
    ),
    "shape": Experiment(
        "Is it Qwen3's qk-norm? The same model in Llama's shape.",
        {
            "GRPO": GRPO,
            "BuPO layer 3": "--bupo-layer 3 --bupo-steps 15",
        },
        f"--model tiny-llama {SHORT}",
    ),
    "variants": Experiment(
        "What do the knobs of later papers do here?",
        {
            "GRPO": GRPO,
            "CISPO": f"{GRPO} --objective cispo",
            "GSPO": f"{GRPO} --objective gspo --loss seq-mean --clip-low 3e-4 --clip-high 4e-4",
            "DPPO": f"{GRPO} --objective dppo",
            "MaxRL": f"{GRPO} --advantage maxrl",
            "top 20 % entropy": f"{GRPO} --entropy-top 0.2",
            "top 20 % entropy of layer 2": f"{GRPO} --entropy-top 0.2 --entropy-layer 2",
            "OISD of layer 3": f"{GRPO} --align 0.1 --align-layer 3",
        },
        SHORT,
    ),
}
