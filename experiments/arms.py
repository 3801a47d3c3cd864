"""The experiments: a question each, and the runs of train.py that answer it. The first arm is what
the others are compared with. All but `words` are on the tiny model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    question: str
    arms: dict[str, str]  # name -> flags of train.py; "-m MODULE ..." runs that module in its place
    common: str = ""  # flags of all arms
    command: str = "train.py"
    at: tuple[int, ...] = (10,)  # steps of the table, beside the last one
    more: tuple[str, ...] = ()  # further columns, as "layer_rms 1": see experiments/table.py
    seeds: int = 8  # seeds 1 to this


LONG = "--steps 40 --eval-every 10 --save-every 40 --watch-layers 5"
SHORT = "--steps 20 --eval-every 10 --save-every 20 --watch-layers 0"
GRPO = "--bupo-layer none"
TRAP = "-m experiments.traps"

EXPERIMENTS = {
    "default": Experiment("What does `python train.py` reach?", {"default": ""}, at=(0, 10, 30)),
    "layers": Experiment(
        "Does training an internal layer first help, and is it the internal objective or only that "
        "fewer blocks learn?",
        {
            "grpo": GRPO,
            "bupo1": "--bupo-layer 1 --bupo-steps 15",
            "bupo2": "--bupo-layer 2 --bupo-steps 15",
            "bupo3": "--bupo-layer 3 --bupo-steps 15",
            "blocks1": f"{GRPO} --train-blocks 1-1 --train-blocks-steps 15",
            "blocks1-2": f"{GRPO} --train-blocks 1-2 --train-blocks-steps 15",
            "blocks1-3": f"{GRPO} --train-blocks 1-3 --train-blocks-steps 15",
        },
        LONG,
        at=(10, 20),
    ),
    "length": Experiment(
        "How long should the internal phase be? Layer 3, from no step of 40 to all.",
        {
            "0": GRPO,
            "5": "--bupo-layer 3 --bupo-steps 5",
            "15": "--bupo-layer 3 --bupo-steps 15",
            "25": "--bupo-layer 3 --bupo-steps 25",
            "40": "--bupo-layer 3 --bupo-steps 40",
            "auto": "--bupo-layer 3 --bupo-steps auto",
        },
        LONG,
        more=("internal_steps 40",),
    ),
    "norm": Experiment(
        "Is it the scale of a state that makes a layer's policy? A norm before its unembedding, a "
        "temperature of its own, or neither.",
        {
            "none": "--bupo-layer 3 --bupo-steps 15",
            "rms": "--bupo-layer 3 --bupo-steps 15 --internal-norm rms",
            "final": "--bupo-layer 3 --bupo-steps 15 --internal-norm final",
            "temperature2": "--bupo-layer 3 --bupo-steps 15 --internal-temperature 2",
            "grpo": GRPO,
        },
        LONG,
        more=("trained_entropy 1", "trained_entropy 10", "layer_rms 1", "layer_rms 10"),
    ),
    "order": Experiment(
        "Does bottom-up matter? Fifteen steps of layer 3 before, after or together with the whole.",
        {
            "bottom-up": "--bupo-layer 3 --bupo-steps 15",
            "two-phases": "--bupo-layer 2,3 --bupo-steps 8,7",
            "top-down": "--bupo-layer 4,3 --bupo-steps 25,15",
            "both-at-once": "--bupo-layer 3+4 --bupo-steps 15",
            "grpo": GRPO,
        },
        LONG,
    ),
    "reward": Experiment(
        "How much of the gain needs right answers? Rewards for a box alone, and by a coin.",
        {
            "verdict": GRPO,
            "format": f"{GRPO} --reward format",
            "coin": f"{GRPO} --reward random",
            "coin-bupo3": "--bupo-layer 3 --bupo-steps 15 --reward random",
        },
        SHORT,
    ),
    "traps": Experiment(
        "What do well-known faults cost that no error message tells of?",
        {
            "right": GRPO,
            "clip-sign": f"{TRAP} clip-sign {GRPO}",
            "stop-token": f"{TRAP} stop-token {GRPO}",
            "micro-mean": f"{TRAP} micro-mean {GRPO}",
            "bfloat16": f"{GRPO} --dtype bfloat16 --optimizer adamw",
            "T0.6-forgotten": f"{TRAP} temperature {GRPO} --temperature 0.6",
            "T0.6": f"{GRPO} --temperature 0.6",
        },
        SHORT,
    ),
    "shape": Experiment(
        "Is it Qwen3's qk-norm? The same model in Llama's shape.",
        {
            "grpo": GRPO,
            "bupo3": "--bupo-layer 3 --bupo-steps 15",
        },
        f"--model tiny-llama {SHORT}",
    ),
    "variants": Experiment(
        "What do the knobs of later papers do here?",
        {
            "grpo": GRPO,
            "cispo": f"{GRPO} --objective cispo",
            "gspo": f"{GRPO} --objective gspo --loss seq-mean --clip-low 3e-4 --clip-high 4e-4",
            "dppo": f"{GRPO} --objective dppo",
            "maxrl": f"{GRPO} --advantage maxrl",
            "entropy-top": f"{GRPO} --entropy-top 0.2",
            "entropy-top-2": f"{GRPO} --entropy-top 0.2 --entropy-layer 2",
            "oisd3": f"{GRPO} --align 0.1 --align-layer 3",
        },
        SHORT,
    ),
    "words": Experiment(
        "And on a real pretrained model? SmolLM2-135M-Instruct, 30 layers, word problems of one "
        "operation.",
        {
            "grpo": GRPO,
            "bupo10": "--bupo-layer 10 --bupo-steps 5",
            "bupo20": "--bupo-layer 20 --bupo-steps 5",
            "bupo25": "--bupo-layer 25 --bupo-steps 5",
            "bupo10-norm": "--bupo-layer 10 --bupo-steps 5 --internal-norm final",
            "bupo20-norm": "--bupo-layer 20 --bupo-steps 5 --internal-norm final",
            "bupo25-norm": "--bupo-layer 25 --bupo-steps 5 --internal-norm final",
            "blocks1-25": f"{GRPO} --train-blocks 1-25 --train-blocks-steps 5",
        },
        "--recipe words --prompts 6 --mini-prompts 6 --slots 48 --steps 10 --eval-every 5 "
        "--eval-limit 100 --save-every 10 --watch-layers 5",
        at=(5,),
        more=("grad_norm 1", "trained_entropy 1", "layer_kl 1", "layer_kl 5"),
        seeds=2,
    ),
}
